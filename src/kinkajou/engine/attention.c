/* One decoding step of attention on a CPU: each row's new key and value are kept, and its one query goes over the
   row's own keys, however long the others are.  Built by native.py; shapes as in cache.py: n rows, g key heads,
   `repeat` query heads to each, d head size.  Rows of q, k, v have any strides; their last dimension is dense. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float from_bfloat16(bfloat16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bfloat16)((bits >> 16) | 64); /* NaN stays NaN */
  return (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define SAME(x) (x)
#define BLOCK 16

/* window 0: none.  slopes NULL: no alibi. */
#define ATTEND(NAME, TYPE, LOAD, STORE)                                                                             \
  int NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *keys, TYPE *values, const int64_t *positions,         \
           const float *slopes, TYPE *out, int64_t n, int64_t g, int64_t repeat, int64_t d, int64_t capacity,       \
           int64_t window, float scale, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head,               \
           int64_t v_row, int64_t v_head) {                                                                         \
    int failed = 0;                                                                                                 \
    _Pragma("omp parallel for schedule(dynamic, 4) reduction(|:failed)")                                            \
    for (int64_t item = 0; item < n * g; item++) {                                                                  \
      int64_t row = item / g, head = item % g, at = positions[row];                                                 \
      int64_t first = window > 0 && at >= window ? at - window + 1 : 0, seen = at - first + 1;                      \
      TYPE *own_keys = keys + item * capacity * d, *own_values = values + item * capacity * d;                      \
      memcpy(own_keys + at * d, k + row * k_row + head * k_head, d * sizeof(TYPE));                                 \
      memcpy(own_values + at * d, v + row * v_row + head * v_head, d * sizeof(TYPE));                               \
      float *scores = malloc((seen + 3 * d) * sizeof(float));                                                       \
      if (!scores) {                                                                                                \
        failed = 1;                                                                                                 \
        continue;                                                                                                   \
      }                                                                                                             \
      float *query = scores + seen, *mixed = query + d, *part = mixed + d;                                          \
      for (int64_t r = 0; r < repeat; r++) {                                                                        \
        int64_t h = head * repeat + r;                                                                              \
        const TYPE *own_query = q + row * q_row + h * q_head;                                                       \
        for (int64_t c = 0; c < d; c++) query[c] = LOAD(own_query[c]), mixed[c] = 0;                                \
        float top = -INFINITY;                                                                                      \
        double sum = 0;                                                                                             \
        for (int64_t j = 0; j < seen; j++) {                                                                        \
          const TYPE *key = own_keys + (first + j) * d;                                                             \
          float score = 0;                                                                                          \
          _Pragma("omp simd reduction(+ : score)")                                                                  \
          for (int64_t c = 0; c < d; c++) score += query[c] * LOAD(key[c]);                                         \
          score *= scale;                                                                                           \
          if (slopes) score += slopes[h] * (float)(first + j - at);                                                 \
          scores[j] = score;                                                                                        \
          top = score > top ? score : top;                                                                          \
        }                                                                                                           \
        for (int64_t j = 0; j < seen; j++) scores[j] = expf(scores[j] - top), sum += scores[j];                     \
        for (int64_t block = 0; block < seen; block += BLOCK) { /* short sums round less than one long one */       \
          int64_t end = block + BLOCK < seen ? block + BLOCK : seen;                                                \
          for (int64_t c = 0; c < d; c++) part[c] = 0;                                                              \
          for (int64_t j = block; j < end; j++) {                                                                   \
            const TYPE *value = own_values + (first + j) * d;                                                       \
            float weight = scores[j];                                                                               \
            _Pragma("omp simd")                                                                                     \
            for (int64_t c = 0; c < d; c++) part[c] += weight * LOAD(value[c]);                                     \
          }                                                                                                         \
          for (int64_t c = 0; c < d; c++) mixed[c] += part[c];                                                      \
        }                                                                                                           \
        TYPE *own_out = out + (row * g * repeat + h) * d;                                                           \
        for (int64_t c = 0; c < d; c++) own_out[c] = STORE((float)(mixed[c] / sum));                                \
      }                                                                                                             \
      free(scores);                                                                                                 \
    }                                                                                                               \
    return failed;                                                                                                  \
  }

ATTEND(attend_float32, float, SAME, SAME)
ATTEND(attend_bfloat16, bfloat16, from_bfloat16, to_bfloat16)
