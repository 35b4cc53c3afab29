/* What a decoder layer does between its matrix products, one pass each, on processors with AVX512-BF16: bfloat16 in and
 * out, fp32 in between, rounded once. Widths are multiples of 16.
 */

#include <immintrin.h>
#include <stdint.h>

#define MANY 8 /* tokens from which it is worth starting threads */

static inline __m512 load(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static inline void store(uint16_t *to, __m512 value) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
}

static inline __m512 rounded(__m512 value) {
    __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline float scale_of(__m512 squares, int64_t width, float epsilon) {
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon);
}

/* x += delta (where there is one), y = x / rms(x) * weight; x, delta and y are [tokens, width]. */
void grace_add_norm(uint16_t *x, const uint16_t *delta, const uint16_t *weight, uint16_t *y, int64_t tokens,
                    int64_t width, float epsilon, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= MANY) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        uint16_t *row = x + t * width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) {
            __m512 value = load(row + i);
            if (delta) {
                value = rounded(_mm512_add_ps(value, load(delta + t * width + i)));
                store(row + i, value);
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(scale_of(squares, width, epsilon));
        for (int64_t i = 0; i < width; i += 16)
            store(y + t * width + i, _mm512_mul_ps(_mm512_mul_ps(load(row + i), scale), load(weight + i)));
    }
}

typedef struct {
    const uint16_t *qkv;    /* [tokens, queries + 2 keys, size] */
    const uint16_t *weight; /* of the norms of queries and keys [queries + keys, size] */
    const uint16_t *cosine; /* [tokens, size] */
    const uint16_t *sine;   /* [tokens, size], negative in the first half */
    uint16_t *query;        /* out: [tokens, queries, size] */
    uint16_t *key, *value;  /* caches [rows, keys, context, size] */
    const int64_t *rows, *places; /* of each token in the caches */
    int64_t tokens, queries, keys, size, context;
    float epsilon;
} Rotation;

/* Norms and turns queries and keys, and puts keys and values where they belong in the caches. */
void grace_rotate(const Rotation *job, int64_t threads) {
    int64_t size = job->size, half = size / 2, heads = job->queries + job->keys;
#pragma omp parallel for num_threads(threads) if (job->tokens >= MANY) schedule(static)
    for (int64_t t = 0; t < job->tokens; t++) {
        const uint16_t *from = job->qkv + t * (heads + job->keys) * size;
        const uint16_t *cosine = job->cosine + t * size, *sine = job->sine + t * size;
        for (int64_t head = 0; head < heads; head++) {
            const uint16_t *x = from + head * size, *weight = job->weight + head * size;
            int64_t place = ((job->rows[t] * job->keys + head - job->queries) * job->context + job->places[t]) * size;
            uint16_t *to = head < job->queries ? job->query + (t * job->queries + head) * size : job->key + place;
            __m512 squares = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += 16) {
                __m512 value = load(x + i);
                squares = _mm512_fmadd_ps(value, value, squares);
            }
            __m512 scale = _mm512_set1_ps(scale_of(squares, size, job->epsilon));
            for (int64_t i = 0; i < half; i += 16) {
                __m512 first = _mm512_mul_ps(_mm512_mul_ps(load(x + i), scale), load(weight + i));
                __m512 second = _mm512_mul_ps(_mm512_mul_ps(load(x + half + i), scale), load(weight + half + i));
                store(to + i, _mm512_fmadd_ps(second, load(sine + i), _mm512_mul_ps(first, load(cosine + i))));
                store(to + half + i,
                      _mm512_fmadd_ps(first, load(sine + half + i), _mm512_mul_ps(second, load(cosine + half + i))));
            }
        }
        for (int64_t head = 0; head < job->keys; head++) {
            int64_t place = ((job->rows[t] * job->keys + head) * job->context + job->places[t]) * size;
            for (int64_t i = 0; i < size; i += 16)
                _mm256_storeu_si256((__m256i *)(job->value + place + i),
                                    _mm256_loadu_si256((const __m256i *)(from + (heads + head) * size + i)));
        }
    }
}

/* e^x: 2^n times a polynomial of the rest, to about 2 units in the last place. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
    static const float terms[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                   5.0000001201e-1f};
    __m512 sum = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 6; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(terms[i]));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(sum, n);
}

/* y = silu(gate) * up for [tokens, 2 width] of gate and up side by side. */
void grace_gate(const uint16_t *both, uint16_t *y, int64_t tokens, int64_t width, int64_t threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads) if (tokens >= MANY) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *gate = both + 2 * t * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += 16) {
            __m512 x = load(gate + i);
            __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            store(y + t * width + i, _mm512_mul_ps(_mm512_div_ps(x, below), load(up + i)));
        }
    }
}
