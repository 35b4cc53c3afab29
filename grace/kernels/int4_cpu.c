/* y = x W + b for AWQ weights as they lie in the file, on processors with AVX512-BF16. No copy of the weights is made.
 *
 *   W[i, o] = scales[i / g, o] * (q[i, o] - zeros[i / g, o])
 *
 * A row of qweight holds 8 outputs per 32-bit word; nibble p of word c belongs to output 8 c + COLUMN[p]. A panel is 16
 * words of a row: 128 outputs. Of two successive rows, nibble p of a panel gives one vector of 16 lanes, each lane the
 * two inputs of one output: what vdpbf16ps multiplies with two activations. The table lookup that turns a code into
 * bfloat16 looks at the low five bits of each half lane only, so that a shift is all that it takes to get there.
 *
 * Codes minus 8 are exact in bfloat16, products and sums are fp32, the scale is applied once per group.
 */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 128          /* outputs */
#define WORDS 16           /* words of a panel in one row */
#define VECTORS 8          /* vectors of 16 outputs in a panel, one per nibble */
#define MAX_GROUP 128      /* inputs */
#define WEIGHTS_PER_THREAD (1 << 17) /* times tokens, for a thread to be worth its start */
#define SUMS (1 << 18)     /* bytes of sums that stay in a core's second cache beside what else is needed */
#define DIRECT 3           /* tokens multiplied without unpacking the weights first */
#define TALL 6             /* tokens multiplied at once, with ... */
#define HALF 4             /* ... so many vectors: 24 sums stay in registers */

static const int COLUMN[VECTORS] = {0, 2, 4, 6, 1, 3, 5, 7};

typedef struct {
    const int32_t *qweight; /* [inputs, outputs / 8] */
    const int32_t *qzeros;  /* [groups, outputs / 8], or NULL where every zero point is 8 */
    const uint16_t *scales; /* fp16 [groups, outputs] */
    const float *bias;      /* [outputs] or NULL */
    int64_t outputs;
    int64_t at; /* first column of y */
} Part;

typedef struct {
    const uint16_t *x; /* bfloat16 [groups, tokens, group]: what is multiplied at once lies together */
    uint16_t *y;       /* bfloat16 [tokens, width] */
    int64_t tokens, inputs, group, width;
    const float *sums; /* [tokens, groups] of x, or NULL where no part has zero points */
} Call;

/* The codes 0..15 minus 8 in bfloat16, twice: the fifth bit of an index belongs to the next code. */
static __m512i table(void) {
    uint16_t entries[32];
    for (int i = 0; i < 32; i++) {
        float value = (float)((i & 15) - 8);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        entries[i] = (uint16_t)(bits >> 16);
    }
    return _mm512_loadu_si512(entries);
}

static inline __mmask16 words_of(const Part *part, int64_t panel) {
    int64_t left = part->outputs / 8 - panel * WORDS;
    return left >= WORDS ? 0xFFFF : (__mmask16)((1u << left) - 1);
}

/* Two rows of a panel as eight vectors of pairs. */
static inline __attribute__((always_inline)) void expand(__m512i low_row, __m512i high_row, __m512i codes,
                                                         __m512i pairs[VECTORS]) {
    const __mmask32 odd = 0xAAAAAAAA;
    __m512i first = _mm512_mask_blend_epi16(odd, low_row, _mm512_slli_epi32(high_row, 16));
    __m512i second = _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(low_row, 16), high_row);
    pairs[0] = _mm512_permutexvar_epi16(first, codes);
    pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi32(first, 4), codes);
    pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(first, 8), codes);
    pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi32(first, 12), codes);
    pairs[4] = _mm512_permutexvar_epi16(second, codes);
    pairs[5] = _mm512_permutexvar_epi16(_mm512_srli_epi32(second, 4), codes);
    pairs[6] = _mm512_permutexvar_epi16(_mm512_srli_epi32(second, 8), codes);
    pairs[7] = _mm512_permutexvar_epi16(_mm512_srli_epi32(second, 12), codes);
}

/* Scales of one group and panel in the order of the vectors, and (8 - zero) * scale where there are zero points. */
static inline void scales_of(const Part *part, int64_t group, int64_t panel, __mmask16 words, __m512 scale[VECTORS],
                             __m512 offset[VECTORS]) {
    float plain[PANEL];
    const uint16_t *from = part->scales + group * part->outputs + panel * PANEL;
    for (int v = 0; v < VECTORS; v++) { /* 16 scales are two words */
        __mmask16 here = 0;
        if ((words >> (2 * v)) & 1) here |= 0x00FF;
        if ((words >> (2 * v + 1)) & 1) here |= 0xFF00;
        __m256i half = _mm256_maskz_loadu_epi16(here, from + 16 * v);
        _mm512_storeu_ps(plain + 16 * v, _mm512_cvtph_ps(half));
    }
    const __m512i eight = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (int v = 0; v < VECTORS; v++)
        scale[v] = _mm512_i32gather_ps(_mm512_add_epi32(eight, _mm512_set1_epi32(COLUMN[v])), plain, 4);
    if (!part->qzeros) return;
    __m512i zeros = _mm512_maskz_loadu_epi32(words, part->qzeros + group * (part->outputs / 8) + panel * WORDS);
    for (int v = 0; v < VECTORS; v++) {
        __m512i zero = _mm512_and_si512(_mm512_srlv_epi32(zeros, _mm512_set1_epi32(4 * v)), _mm512_set1_epi32(15));
        __m512 away = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), zero));
        offset[v] = _mm512_mul_ps(away, scale[v]);
    }
}

static inline __m512bh two_of(const uint16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

/* total[tokens][8] += scale * sum of `count` tokens from `token` on and `width` vectors from `first` on. */
static inline __attribute__((always_inline)) void add(const Call *call, const __m512 *sum, int count, int first, int width,
                                                      int64_t token, int64_t group, const __m512 *scale,
                                                      const __m512 *offset, __m512 *total) {
    for (int t = 0; t < count; t++)
        for (int v = 0; v < width; v++) {
            __m512 *to = total + (token + t) * VECTORS + first + v;
            *to = _mm512_fmadd_ps(scale[first + v], sum[t * width + v], *to);
            if (offset) {
                float of_x = call->sums[(token + t) * (call->inputs / call->group) + group];
                *to = _mm512_fmadd_ps(offset[first + v], _mm512_set1_ps(of_x), *to);
            }
        }
}

/* The sums of one group for some tokens and vectors. Their numbers are constants, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply(const Call *call, const __m512i *pairs, int count, int first,
                                                           int width, int64_t token, int64_t group, const __m512 *scale,
                                                           const __m512 *offset, __m512 *total) {
    __m512 sum[TALL * HALF];
    for (int i = 0; i < count * width; i++) sum[i] = _mm512_setzero_ps();
    const uint16_t *x = call->x + (group * call->tokens + token) * call->group;
    for (int t = 0; t < count; t++) { /* the sums so far, and the next tokens: there by the time they are wanted */
        for (int v = 0; v < width; v++) _mm_prefetch(total + (token + t) * VECTORS + first + v, _MM_HINT_T0);
        for (int64_t k = 0; k < call->group; k += 32) _mm_prefetch(x + (count + t) * call->group + k, _MM_HINT_T0);
    }
    for (int64_t pair = 0; pair < call->group / 2; pair++) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < width; v++) weights[v] = (__m512bh)pairs[pair * VECTORS + first + v];
        for (int t = 0; t < count; t++) {
            __m512bh activations = two_of(x + t * call->group + 2 * pair);
            for (int v = 0; v < width; v++)
                sum[t * width + v] = _mm512_dpbf16_ps(sum[t * width + v], weights[v], activations);
        }
    }
    add(call, sum, count, first, width, token, group, scale, offset, total);
}

/* Cache lines that will be needed soon, row after row: asked for two at a time, between the sums. */
typedef struct {
    const char *line, *row_end;
    int64_t across, down; /* bytes of a row that are wanted, and from one row to the next */
    int64_t rows;
} Fetch;

static inline __attribute__((always_inline)) void fetch_two(Fetch *fetch) {
    for (int i = 0; i < 2; i++) {
        if (!fetch->rows) return;
        _mm_prefetch(fetch->line, _MM_HINT_T0);
        fetch->line += 64;
        if (fetch->line >= fetch->row_end) {
            fetch->row_end += fetch->down;
            fetch->line = fetch->row_end - fetch->across;
            fetch->rows--;
        }
    }
}

/* The same for all vectors, straight from two rows at a time to the sums: what is fastest where memory is the limit. */
static inline __attribute__((always_inline)) void walk(const Call *call, const int32_t *from, int64_t row, __mmask16 words,
                                                       __m512i codes, int count, int64_t group, const __m512 *scale,
                                                       const __m512 *offset, __m512 *total, Fetch *fetch) {
    __m512 sum[DIRECT * VECTORS];
    for (int i = 0; i < count * VECTORS; i++) sum[i] = _mm512_setzero_ps();
    const uint16_t *x = call->x + group * count * call->group;
    for (int64_t k = 0; k < call->group; k += 2) {
        fetch_two(fetch);
        __m512i pairs[VECTORS];
        expand(_mm512_maskz_loadu_epi32(words, from + k * row), _mm512_maskz_loadu_epi32(words, from + (k + 1) * row), codes,
               pairs);
        __m512bh activations[DIRECT];
        for (int t = 0; t < count; t++) activations[t] = two_of(x + t * call->group + k);
        for (int v = 0; v < VECTORS; v++)
            for (int t = 0; t < count; t++)
                sum[t * VECTORS + v] = _mm512_dpbf16_ps(sum[t * VECTORS + v], (__m512bh)pairs[v], activations[t]);
    }
    add(call, sum, count, 0, VECTORS, 0, group, scale, offset, total);
}

/* One group of one panel for all tokens. `total` is [tokens][8]. */
static void step(const Call *call, const Part *part, int64_t group, int64_t panel, __m512i codes, __m512 *total,
                 __m512i *pairs, Fetch *fetch) {
    int64_t row = part->outputs / 8;
    const int32_t *from = part->qweight + group * call->group * row + panel * WORDS;
    __mmask16 words = words_of(part, panel);
    __m512 scale[VECTORS], offset[VECTORS];
    scales_of(part, group, panel, words, scale, offset);
    const __m512 *offsets = part->qzeros ? offset : NULL;
#define WALK(count) walk(call, from, row, words, codes, count, group, scale, offsets, total, fetch)
    switch (call->tokens) {
    case 1: WALK(1); return;
    case 2: WALK(2); return;
    case 3: WALK(3); return;
    }
#undef WALK
    for (int64_t k = 0; k < call->group; k += 2) {
        fetch_two(fetch);
        expand(_mm512_maskz_loadu_epi32(words, from + k * row), _mm512_maskz_loadu_epi32(words, from + (k + 1) * row), codes,
               pairs + k / 2 * VECTORS);
    }
    int64_t token = 0;
#define MULTIPLY(count, first, width) multiply(call, pairs, count, first, width, token, group, scale, offsets, total)
    for (int first = 0; first < VECTORS; first += HALF)
        for (token = 0; token + TALL <= call->tokens; token += TALL) MULTIPLY(TALL, first, HALF);
    switch (call->tokens - token) {
    case 5: MULTIPLY(5, 0, HALF); MULTIPLY(5, HALF, HALF); break;
    case 4: MULTIPLY(4, 0, HALF); MULTIPLY(4, HALF, HALF); break;
    case 3: MULTIPLY(3, 0, VECTORS); break;
    case 2: MULTIPLY(2, 0, VECTORS); break;
    case 1: MULTIPLY(1, 0, VECTORS); break;
    }
#undef MULTIPLY
}

/* Eight vectors, one per column of a word, as eight vectors of two words each: words j and 4 + j, then 8 + j and 12 + j. */
static inline void by_word(const __m512 *total, const int order[VECTORS], __m512 out[VECTORS]) {
    __m512 column[VECTORS], quad[VECTORS];
    for (int v = 0; v < VECTORS; v++) column[order[v]] = total[v];
    for (int h = 0; h < 2; h++) {
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(column[4 * h], column[4 * h + 1]));
        __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(column[4 * h + 2], column[4 * h + 3]));
        __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(column[4 * h], column[4 * h + 1]));
        __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(column[4 * h + 2], column[4 * h + 3]));
        quad[4 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        quad[4 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        quad[4 * h + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        quad[4 * h + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int j = 0; j < 4; j++) {
        out[2 * j] = _mm512_permutex2var_ps(quad[j], low, quad[4 + j]);
        out[2 * j + 1] = _mm512_permutex2var_ps(quad[j], high, quad[4 + j]);
    }
}

/* Sums of one panel, with the bias, as bfloat16 in the order of the outputs. */
static void store(const Call *call, const Part *part, int64_t panel, const __m512 *total) {
    int64_t first = panel * PANEL;
    __mmask16 words = words_of(part, panel);
    for (int64_t token = 0; token < call->tokens; token++) {
        __m512 pairs[VECTORS];
        by_word(total + token * VECTORS, COLUMN, pairs);
        uint16_t *to = call->y + token * call->width + part->at + first;
        for (int j = 0; j < VECTORS; j++) {
            int at[2] = {j / 2 + (j & 1 ? 8 : 0), j / 2 + (j & 1 ? 12 : 4)}; /* its two words */
            if (part->bias) {
                __m512 bias = _mm512_setzero_ps();
                if (words >> at[0] & 1) bias = _mm512_insertf32x8(bias, _mm256_loadu_ps(part->bias + first + 8 * at[0]), 0);
                if (words >> at[1] & 1) bias = _mm512_insertf32x8(bias, _mm256_loadu_ps(part->bias + first + 8 * at[1]), 1);
                pairs[j] = _mm512_add_ps(pairs[j], bias);
            }
            __m256i both = (__m256i)_mm512_cvtneps_pbh(pairs[j]);
            if (words >> at[0] & 1) _mm_storeu_si128((__m128i *)(to + 8 * at[0]), _mm256_castsi256_si128(both));
            if (words >> at[1] & 1) _mm_storeu_si128((__m128i *)(to + 8 * at[1]), _mm256_extracti128_si256(both, 1));
        }
    }
}

/* Panels [first, last) of one part, in blocks: group after group of a block, so that rows are read one after another
 * while its sums stay in the cache. */
static int panels(const Call *call, const Part *part, int64_t first, int64_t last) {
    int64_t groups = call->inputs / call->group, row = part->outputs / 8;
    int64_t one = call->tokens * VECTORS * (int64_t)sizeof(__m512), wide = SUMS / one;
    if (wide < 1) wide = 1;
    if (wide > last - first) wide = last - first;
    char *memory = aligned_alloc(64, (size_t)(wide * one) + sizeof(__m512i) * VECTORS * MAX_GROUP / 2);
    if (!memory) return 1;
    __m512 *total = (__m512 *)memory;
    __m512i *pairs = (__m512i *)(memory + wide * one);
    const __m512i codes = table();
    for (; first < last; first += wide) {
        int64_t stop = first + wide < last ? first + wide : last;
        memset(total, 0, (size_t)((stop - first) * one));
        for (int64_t group = 0; group < groups; group++) {
            const char *next = (const char *)(part->qweight + (group + 1) * call->group * row + first * WORDS);
            int64_t across = 64 * (stop - first);
            Fetch fetch = {next, next + across, across, 4 * row, group + 1 < groups ? call->group : 0};
            for (int64_t panel = first; panel < stop; panel++)
                step(call, part, group, panel, codes, total + (panel - first) * call->tokens * VECTORS, pairs, &fetch);
        }
        for (int64_t panel = first; panel < stop; panel++)
            store(call, part, panel, total + (panel - first) * call->tokens * VECTORS);
    }
    free(memory);
    return 0;
}

static int64_t panels_in(const Part *part) { return (part->outputs + PANEL - 1) / PANEL; }

/* All parts, side by side in y. Returns 0, or 1 when memory ran out. */
int grace_int4_matmul(const Call *call, const Part *parts, int64_t count, int64_t threads) {
    int64_t all = 0;
    int failed = 0;
    for (int64_t i = 0; i < count; i++) all += panels_in(&parts[i]);
    int64_t worth = 1 + call->tokens * call->inputs * all * PANEL / WEIGHTS_PER_THREAD;
    if (threads > all) threads = all;
    if (threads > worth) threads = worth;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
    for (int64_t thread = 0; thread < threads; thread++) {
        int64_t begin = all * thread / threads, end = all * (thread + 1) / threads, before = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t here = panels_in(&parts[i]);
            int64_t first = begin > before ? begin - before : 0, last = end - before < here ? end - before : here;
            if (first < last) failed |= panels(call, &parts[i], first, last);
            before += here;
        }
    }
    return failed;
}
