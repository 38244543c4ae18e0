"""`python -m dsso`: check recipes without starting anything, or print what a recipe may hold.

python -m dsso configs/*.json
python -m dsso configs/kfac_minilm_mrpc_lora.json --set optimizer.params.tau=0.5
python -m dsso --schema > recipe.schema.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dsso import recipe_docs
from dsso.errors import RecipeError
from dsso.recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the schema or the field reference, or check files; returns the exit status."""
    parser = argparse.ArgumentParser("python -m dsso", description="Check recipes, or describe them.")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a recipe")
    parser.add_argument(
        "--update",
        type=Path,
        metavar="PAGE",
        help="bring the tables of docs/recipe.md or docs/sweeps.md up to date",
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a value")
    parser.add_argument("files", nargs="*", help="recipes to check")
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(recipe_docs.json_schema(), indent=2))
    if given.update:
        given.update.write_text(recipe_docs.fill(given.update.read_text(encoding="utf-8")), encoding="utf-8")
    status = 0
    for file in given.files:
        try:
            recipe = load_recipe(file, given.set)
        except RecipeError as error:
            print(f"{file}: {error}", file=sys.stderr)
            status = RecipeError.exit_status
        else:
            kind, dtype = recipe.optimizer_type, recipe.precision.dtype
            print(f"{file}: {kind}, ZeRO stage {recipe.zero_stage}, {dtype}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
