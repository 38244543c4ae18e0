// X = (L L^T)^-1 B for a few columns, in place: the kernel of dsso.linalg.solve_cpu.
//
// L is the lower triangle of a square kept row by row; nothing above its diagonal is read. With few columns the solve is
// as fast as L can be read, which it is twice: rows from the first to the last against what is solved already, and
// from the last to the first into what is not. Plain C interface, so that it is built without any headers but the
// standard ones.

#include <cstdint>
#include <cstring>

namespace {

// Columns of one vector; the compiler splits it where registers are narrower.
constexpr int kWide = 8;
typedef float Vec __attribute__((vector_size(kWide * sizeof(float)), aligned(4), may_alias));

inline float load(const float* at) { return *at; }

inline float load(const uint16_t* at) {  // bfloat16
    const uint32_t bits = static_cast<uint32_t>(*at) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Terms of a sum, and rows, after which what was added up is added to the rest: a multiple of all kRows.
constexpr int64_t kPanel = 128;

// Rows worked on together: enough sums to hide the latency of a multiply-add, few enough to stay in registers.
template <int V>
constexpr int kRows = V == 1 ? 8 : V < 4 ? 4 : 2;

template <typename T, int V>
struct Block {
    const T* row[kRows<V>];
    Vec value[kRows<V>][V];
    int64_t start;
    int count;

    Block(const T* l, int64_t n, int64_t first, const Vec* y)
        : start(first), count(static_cast<int>(n - first < kRows<V> ? n - first : kRows<V>)) {
        for (int b = 0; b < kRows<V>; ++b) {
            // Of a last block that is not full the first row is worked on again, with zeros.
            row[b] = l + (start + (b < count ? b : 0)) * n;
            for (int v = 0; v < V; ++v) value[b][v] = b < count ? y[(start + b) * V + v] : Vec{};
        }
    }

    // value -= L y, columns from .. to - 1: summed up by themselves, so that rounding grows with sums of kPanel terms.
    void take(const Vec* y, int64_t from, int64_t to) {
        Vec sum[kRows<V>][V] = {};
        for (int64_t j = from; j < to; ++j)
            for (int b = 0; b < kRows<V>; ++b) {
                const float factor = load(row[b] + j);
                for (int v = 0; v < V; ++v) sum[b][v] += factor * y[j * V + v];
            }
        for (int b = 0; b < kRows<V>; ++b)
            for (int v = 0; v < V; ++v) value[b][v] -= sum[b][v];
    }

    // y -= L^T value, rows from .. to - 1 of y.
    void give(Vec* y, int64_t from, int64_t to) const {
        for (int64_t j = from; j < to; ++j)
            for (int v = 0; v < V; ++v) {
                Vec left = y[j * V + v];
                for (int b = 0; b < kRows<V>; ++b) left -= load(row[b] + j) * value[b][v];
                y[j * V + v] = left;
            }
    }

    void forward(Vec* y) {
        for (int b = 0; b < count; ++b)
            for (int v = 0; v < V; ++v) {
                for (int c = 0; c < b; ++c) value[b][v] -= load(row[b] + start + c) * value[c][v];
                y[(start + b) * V + v] = value[b][v] /= load(row[b] + start + b);
            }
    }

    void backward(Vec* y) {
        for (int b = count - 1; b >= 0; --b)
            for (int v = 0; v < V; ++v) {
                for (int c = b + 1; c < count; ++c) value[b][v] -= load(row[c] + start + b) * value[c][v];
                y[(start + b) * V + v] = value[b][v] /= load(row[b] + start + b);
            }
    }
};

template <typename T, int V>
void solve(const T* l, int64_t n, Vec* y, Vec* work) {
    for (int64_t start = 0; start < n; start += kRows<V>) {
        Block<T, V> block(l, n, start, y);
        for (int64_t from = 0; from < start; from += kPanel)
            block.take(y, from, from + kPanel < start ? from + kPanel : start);
        block.forward(y);
    }
    for (int64_t panel = (n - 1) / kPanel * kPanel; panel >= 0; panel -= kPanel) {
        const int64_t end = panel + kPanel < n ? panel + kPanel : n;
        std::memset(work, 0, static_cast<size_t>(panel) * V * sizeof(Vec));
        for (int64_t start = panel + (end - panel - 1) / kRows<V> * kRows<V>; start >= panel; start -= kRows<V>) {
            Block<T, V> block(l, n, start, y);
            block.backward(y);
            block.give(y, panel, start);
            block.give(work, 0, panel);
        }
        for (int64_t i = 0; i < panel * V; ++i) y[i] += work[i];
    }
}

template <typename T>
int choose(const T* l, int64_t n, Vec* y, Vec* work, int vectors) {
    switch (vectors) {
        case 1: solve<T, 1>(l, n, y, work); return 0;
        case 2: solve<T, 2>(l, n, y, work); return 0;
        case 3: solve<T, 3>(l, n, y, work); return 0;
        case 4: solve<T, 4>(l, n, y, work); return 0;
        default: return 1;
    }
}

}  // namespace

// Types of L: 0 float32, 1 bfloat16. `columns` of `values` and `work`, both [side, columns] float32, is a multiple of 8
// up to 32. Returns 0, or 1 where there is no kernel.
extern "C" int dsso_solve_lower(const void* lower, int type, int64_t side, float* values, float* work, int columns) {
    Vec *y = reinterpret_cast<Vec*>(values), *w = reinterpret_cast<Vec*>(work);
    if (columns % kWide) return 1;
    if (type == 0) return choose(static_cast<const float*>(lower), side, y, w, columns / kWide);
    if (type == 1) return choose(static_cast<const uint16_t*>(lower), side, y, w, columns / kWide);
    return 1;
}
