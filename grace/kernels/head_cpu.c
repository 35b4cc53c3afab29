/* Rounding an output layer to 4 bits while loading, on processors with AVX512-BF16: bfloat16 in, AWQ's layout out.
 *
 * One scale for every 128 inputs of an output, which puts the largest of them on code 7. Codes and scales are those of
 * grid.quantize, bit for bit; this makes one pass where that makes many.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define GROUP 128
#define BLOCK 128 /* outputs at a time: a cache line of words for each input */
#define WORDS (BLOCK / 8)
#define SCALE_MIN 0x1p-14f /* as snap() of grid.py */
#define SCALE_MAX 0x1p15f
#define INFINITE 0x7f80 /* as bfloat16; NaNs are above it */

static const int output_of_nibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};

static inline __m512 widened(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* The bits of the largest absolute value of a group. */
static inline uint16_t largest_of(const uint16_t *weight) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < GROUP; i += 32)
        largest = _mm512_max_epu16(
            largest, _mm512_and_si512(_mm512_loadu_si512(weight + i), _mm512_set1_epi16(0x7fff)));
    uint16_t lanes[32], found = 0;
    _mm512_storeu_si512(lanes, largest);
    for (int i = 0; i < 32; i++)
        found = lanes[i] > found ? lanes[i] : found;
    return found;
}

static inline float scale_of(uint16_t largest) {
    uint32_t bits = (uint32_t)largest << 16;
    float scale;
    memcpy(&scale, &bits, 4);
    scale /= 7;
    scale = scale > SCALE_MIN ? scale : SCALE_MIN;
    scale = scale < SCALE_MAX ? scale : SCALE_MAX;
    memcpy(&bits, &scale, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000; /* to the nearest bfloat16, ties to even */
    memcpy(&scale, &bits, 4);
    return scale;
}

static inline void round_group(const uint16_t *weight, float scale, int8_t *codes) {
    for (int i = 0; i < GROUP; i += 16) {
        __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(widened(weight + i), _mm512_set1_ps(scale)));
        code = _mm512_max_epi32(_mm512_min_epi32(code, _mm512_set1_epi32(7)), _mm512_set1_epi32(-8));
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
    }
}

/* Eight outputs' codes [8, GROUP] to a word for each input. */
static inline void pack_group(const int8_t *codes, uint32_t *words) {
    for (int i = 0; i < GROUP; i += 16) {
        __m512i word = _mm512_setzero_si512();
        for (int nibble = 0; nibble < 8; nibble++) {
            const int8_t *from = codes + output_of_nibble[nibble] * GROUP + i;
            __m512i value = _mm512_add_epi32(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)), _mm512_set1_epi32(8));
            word = _mm512_or_si512(word, _mm512_slli_epi32(value, 4 * nibble));
        }
        _mm512_storeu_si512(words + i, word);
    }
}

/* weight [outputs, inputs], outputs a multiple of 8, inputs of GROUP; words [inputs, outputs / 8], scales fp16
 * [inputs / GROUP, outputs]. Returns the groups that hold a NaN or an infinity. */
int64_t grace_round_head(const uint16_t *weight, int64_t outputs, int64_t inputs, uint32_t *words, uint16_t *scales,
                         int64_t threads) {
    int64_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : bad)
    for (int64_t first = 0; first < outputs; first += BLOCK) {
        int64_t count = outputs - first < BLOCK ? outputs - first : BLOCK;
        int8_t codes[BLOCK * GROUP];
        uint32_t packed[WORDS * GROUP];
        for (int64_t start = 0; start < inputs; start += GROUP) {
            for (int64_t o = 0; o < count; o++) {
                const uint16_t *group = weight + (first + o) * inputs + start;
                uint16_t largest = largest_of(group);
                bad += largest >= INFINITE;
                float scale = scale_of(largest);
                scales[start / GROUP * outputs + first + o] = _cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT);
                round_group(group, scale, codes + o * GROUP);
            }
            for (int64_t w = 0; w < count / 8; w++)
                pack_group(codes + w * 8 * GROUP, packed + w * GROUP);
            for (int64_t i = 0; i < GROUP; i++)
                for (int64_t w = 0; w < count / 8; w++)
                    words[(start + i) * (outputs / 8) + first / 8 + w] = packed[w * GROUP + i];
        }
    }
    return bad;
}
