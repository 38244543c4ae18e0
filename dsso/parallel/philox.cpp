// out[i] = base[i] + scale z[first + i], z from Philox4x32-10: the fused kernel of dsso.parallel.noise for CPUs.
//
// The specification is in noise.py, that of stochastic rounding in rounding.py; this file gives the same stream
// (Rademacher bit by bit, Gaussian up to the rounding of log, sin and cos). Plain C interface, so that it is built without any headers but the standard ones.

#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
// Counters worked on together: a multiple of the widest vector, small enough for the results to stay in L1.
constexpr int kLanes = 64;

struct Key {
    uint32_t seed0, seed1, name0, name1, stream;
};

// Words w of the blocks first .. first + kLanes - 1, word by word.
inline void philox(const Key& key, uint64_t first, uint32_t w[4][kLanes]) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t block = first + static_cast<uint64_t>(i);
        c0[i] = static_cast<uint32_t>(block);
        c1[i] = key.name0;
        c2[i] = key.name1;
        c3[i] = (key.stream << 8) | static_cast<uint32_t>(block >> 32);
    }
    uint32_t k0 = key.seed0, k1 = key.seed1;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kLanes; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(kMul0) * c0[i];
            const uint64_t p1 = static_cast<uint64_t>(kMul1) * c2[i];
            const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = static_cast<uint32_t>(p1);
            c3[i] = static_cast<uint32_t>(p0);
            c0[i] = n0;
            c2[i] = n2;
        }
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    std::memcpy(w[0], c0, sizeof c0);
    std::memcpy(w[1], c1, sizeof c1);
    std::memcpy(w[2], c2, sizeof c2);
    std::memcpy(w[3], c3, sizeof c3);
}

inline float as_float(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline uint32_t as_bits(float value) {
    uint32_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// Natural logarithm of a normal number in (0, 1]: minimax polynomial on [sqrt(1/2), sqrt(2)), error below 2 ulp.
inline float log_of(float x) {
    const uint32_t bits = as_bits(x);
    const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
    const float m = as_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float e = static_cast<float>(exponent);
    const float square = m * m;
    return m + (m * square * p - 0.5f * square - 2.12194440e-4f * e) + 0.693359375f * e;
}

// cos and sin of 2 pi t / 2^24: the nearest quarter of a turn is taken off exactly, as an integer.
inline void turn(uint32_t t, float* cosine, float* sine) {
    const int32_t quarter = static_cast<int32_t>((t + (1u << 21)) >> 22);  // 0 to 4
    const int32_t rest = static_cast<int32_t>(t) - quarter * (1 << 22);
    const float x = static_cast<float>(rest) * (6.28318530717958648f / 16777216.0f);
    const float y = x * x;
    const float s = x + x * y * (-1.6666654611e-1f + y * (8.3321608736e-3f - y * 1.9515295891e-4f));
    const float c = 1.0f - 0.5f * y +
                    y * y * (4.166664568298827e-2f + y * (-1.388731625493765e-3f + y * 2.443315711809948e-5f));
    const uint32_t odd = 0u - static_cast<uint32_t>(quarter & 1);  // all bits or none
    const uint32_t a = (as_bits(s) & odd) | (as_bits(c) & ~odd), b = (as_bits(c) & odd) | (as_bits(s) & ~odd);
    *cosine = as_float(a ^ (static_cast<uint32_t>(((quarter + 1) >> 1) & 1) << 31));
    *sine = as_float(b ^ (static_cast<uint32_t>((quarter >> 1) & 1) << 31));
}

// z of kLanes blocks of four: words 0 and 1 give elements 0 and 1, words 2 and 3 give elements 2 and 3.
inline void gaussian(const Key& key, uint64_t first, float* z) {
    uint32_t w[4][kLanes];
    philox(key, first, w);
    for (int half = 0; half < 2; ++half) {
        const uint32_t* radius = w[2 * half];
        const uint32_t* angle = w[2 * half + 1];
        float c[kLanes], s[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            // 31 bits, because signed integers are what vector units convert.
            const float u = static_cast<float>(static_cast<int32_t>(radius[i] >> 1)) * 0x1p-31f + 0x1p-32f;
            const float r = __builtin_sqrtf(-2.0f * log_of(u));
            float cosine, sine;
            turn(angle[i] >> 8, &cosine, &sine);
            c[i] = r * cosine;
            s[i] = r * sine;
        }
        for (int i = 0; i < kLanes; ++i) {
            z[4 * i + 2 * half] = c[i];
            z[4 * i + 2 * half + 1] = s[i];
        }
    }
}

// Words of kLanes blocks of four elements, one each: the bits of stochastic rounding.
inline void whole(const Key& key, uint64_t first, uint32_t* out) {
    uint32_t w[4][kLanes];
    philox(key, first, w);
    for (int i = 0; i < kLanes; ++i) {
        out[4 * i] = w[0][i];
        out[4 * i + 1] = w[1][i];
        out[4 * i + 2] = w[2][i];
        out[4 * i + 3] = w[3][i];
    }
}

// z of kLanes blocks of 128: one bit each, a set bit is -1.
inline void rademacher(const Key& key, uint64_t first, float* z) {
    uint32_t w[4][kLanes];
    philox(key, first, w);
    for (int i = 0; i < kLanes; ++i)
        for (int word = 0; word < 4; ++word) {
            const uint32_t bits = w[word][i];
            float* out = z + 128 * i + 32 * word;
            for (uint32_t j = 0; j < 32; ++j) out[j] = as_float(0x3F800000u | (((bits >> j) & 1u) << 31));
        }
}

struct Float {
    using type = float;
    static inline float load(float x) { return x; }
    static inline float store(float x) { return x; }
};

struct BFloat16 {
    using type = uint16_t;
    static inline float load(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
    static inline uint16_t store(float x) {
        const uint32_t bits = as_bits(x);
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const uint32_t nan = (bits >> 16) | 0x40u;
        const uint32_t is_nan = 0u - static_cast<uint32_t>((bits & 0x7FFFFFFFu) > 0x7F800000u);
        return static_cast<uint16_t>((nan & is_nan) | (rounded & ~is_nan));
    }
    // The lower 16 bits are dropped, and carry with the probability of what they stand for.
    static inline uint16_t store(float x, uint32_t word) {
        const uint32_t bits = as_bits(x);
        const uint32_t special = 0u - static_cast<uint32_t>((bits & 0x7F800000u) == 0x7F800000u);
        const uint32_t rounded = (bits + (word >> 16)) >> 16;
        return static_cast<uint16_t>((store(x) & special) | (rounded & ~special));
    }
};

#if defined(__FLT16_MAX__)
struct Half {
    using type = _Float16;
    static inline float load(_Float16 x) { return static_cast<float>(x); }
    static inline _Float16 store(float x) { return static_cast<_Float16>(x); }
    // As above, with a number of dropped bits that grows below the normal numbers of fp16.
    static inline _Float16 store(float x, uint32_t word) {
        const uint32_t bits = as_bits(x), raised = bits >> 23 & 0xFFu;
        const uint32_t exponent = raised > 1 ? raised : 1, top = exponent > 113 ? exponent : 113;
        const uint32_t dropped = 13 + top - exponent;
        const uint64_t significand = (bits & 0x7FFFFFu) | (raised ? 1u << 23 : 0u);
        const uint64_t fixed = (significand << 32) >> (dropped < 63 ? dropped : 63);
        const uint32_t magnitude = ((top - 113) << 10) + static_cast<uint32_t>((fixed + word) >> 32);
        const uint16_t rounded =
            static_cast<uint16_t>((magnitude < 0x7C00u ? magnitude : 0x7C00u) | (bits >> 16 & 0x8000u));
        _Float16 out = static_cast<_Float16>(x);
        if (raised != 0xFFu) std::memcpy(&out, &rounded, sizeof out);
        return out;
    }
};
#endif

enum Kind { kNone, kRademacher, kGaussian };

template <typename Out, typename Base, Kind kKind, bool kStochastic>
void run(void* out_, const void* base_, int64_t count, uint64_t start, const Key& key, uint32_t rounding, float scale,
         int threads) {
    auto* out = static_cast<typename Out::type*>(out_);
    const auto* base = static_cast<const typename Base::type*>(base_);
    constexpr int64_t kPer = kKind == kRademacher ? 128 : 4;
    constexpr int64_t kChunk = kPer * kLanes;
    const Key bits_key{key.seed0, key.seed1, key.name0, key.name1, rounding};
    const uint64_t first = start / kChunk * kChunk, end = start + static_cast<uint64_t>(count);
    const int64_t chunks = static_cast<int64_t>((end - first + kChunk - 1) / kChunk);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        alignas(64) float z[kChunk];
        alignas(64) uint32_t words[kStochastic ? kChunk : 1];
        const uint64_t at = first + static_cast<uint64_t>(chunk) * kChunk;
        if constexpr (kKind == kGaussian) gaussian(key, at / kPer, z);
        if constexpr (kKind == kRademacher) rademacher(key, at / kPer, z);
        if constexpr (kStochastic)
            for (int64_t i = 0; i < kChunk; i += 4 * kLanes) whole(bits_key, (at + i) / 4, words + i);
        const uint64_t from = at < start ? start : at, to = at + kChunk < end ? at + kChunk : end;
        const int64_t skipped = static_cast<int64_t>(from - at), length = static_cast<int64_t>(to - from);
        auto* into = out + (from - start);
        const auto* of = base + (from - start);
        for (int64_t i = 0; i < length; ++i) {
            float value = Base::load(of[i]);
            if constexpr (kKind != kNone) value += scale * z[skipped + i];
            if constexpr (kStochastic)
                into[i] = Out::store(value, words[skipped + i]);
            else
                into[i] = Out::store(value);
        }
    }
}

template <typename Out, typename Base, bool kStochastic>
int choose(int kind, void* out, const void* base, int64_t n, uint64_t start, const Key& key, uint32_t rounding,
           float scale, int t) {
    if (kind == kGaussian)
        run<Out, Base, kGaussian, kStochastic>(out, base, n, start, key, rounding, scale, t);
    else if (kind == kRademacher)
        run<Out, Base, kRademacher, kStochastic>(out, base, n, start, key, rounding, scale, t);
    else
        run<Out, Base, kNone, kStochastic>(out, base, n, start, key, rounding, scale, t);
    return 0;
}

}  // namespace

// Types: 0 float32, 1 bfloat16, 2 float16. Kinds: 0 none, 1 Rademacher, 2 Gaussian. The key: seed (2), name (2), stream,
// stream of the bits of stochastic rounding. Returns 0, or 1 for types that there is no kernel for.
extern "C" int dsso_add_noise(void* out, const void* base, int out_type, int base_type, int64_t count, uint64_t start,
                              const uint32_t* key_, int kind, int stochastic, float scale, int threads) {
    const Key key{key_[0], key_[1], key_[2], key_[3], key_[4]};
    const int types = stochastic * 100 + out_type * 10 + base_type;
#define DSSO_TYPES(number, Out, Base, rounded) \
    case number: return choose<Out, Base, rounded>(kind, out, base, count, start, key, key_[5], scale, threads);
    switch (types) {
        DSSO_TYPES(0, Float, Float, false)
        DSSO_TYPES(10, BFloat16, Float, false)
        DSSO_TYPES(11, BFloat16, BFloat16, false)
        DSSO_TYPES(110, BFloat16, Float, true)
        DSSO_TYPES(111, BFloat16, BFloat16, true)
#if defined(__FLT16_MAX__)
        DSSO_TYPES(20, Half, Float, false)
        DSSO_TYPES(22, Half, Half, false)
        DSSO_TYPES(120, Half, Float, true)
        DSSO_TYPES(122, Half, Half, true)
#endif
        default: return 1;
    }
}
