/* Attention over many short sequences on a CPU, and the second step of trajectory attention.

   A thread takes one sequence at a time into its cache: rows are read where they lie, whatever
   their strides, widened to float, and results are written where they belong. Beside inputs and
   outputs only probabilities reach memory, where the caller gives room to keep them for the
   backward pass; else it forms them again.

   Scores stand with the keys in rows and up to TILE queries in lanes, so that maximum, sum and the
   sums of the backward pass run down columns: no vector is ever summed across.

   native.py compiles this file for the processor it runs on, and calls it. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define HALF (LANES / 2)
#define TILE (4 * LANES)
#if defined(__AVX512F__) || defined(__aarch64__) /* 32 vector registers, else 16 */
#define WIDE 4
#else
#define WIDE 2
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_vec __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static long round_up(long n, long to) { return (n + to - 1) / to * to; }
static vec load(const float *p) { return *(const vec *)p; }
static void store(float *p, vec x) { *(vec *)p = x; }
static vec all(float x) { return x - (vec){0}; }
static vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
static vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* ---- Products of small matrices ---- */

#if defined(__x86_64__) && !(LANES == 4 && defined(__clang__)) /* clang: not half a vector of 4 */
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* else it is loaded again for every row */
#else
#define IN_REGISTER(x)
#endif

/* C = A B, or C += A B if `add`, for matrices of `depth` columns of A. B and C have rows of whole
   (half) vectors; A[i][k] is a[i * ai + k * ak]. */
typedef struct {
  const float *a;
  long ai, ak;
  const float *b;
  long ldb;
  float *c;
  long ldc, depth;
  int add;
} Product;

/* `tall` rows of C, `wide` vectors of each: all sums in registers. */
#define DEFINE_BLOCK(NAME, VEC, N)                                                             \
  static inline __attribute__((always_inline)) void NAME(const int tall, const int wide,       \
                                                         const Product *x, long row) {         \
    const float *a = x->a + row * x->ai, *b = x->b;                                            \
    float *c = x->c + row * x->ldc;                                                            \
    const long ai = x->ai, ak = x->ak, ldb = x->ldb, ldc = x->ldc;                             \
    VEC sum[8][4];                                                                             \
    _Pragma("GCC unroll 8") for (int i = 0; i < tall; i++)                                     \
        _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++)                                 \
            sum[i][j] = x->add ? *(const VEC *)(c + i * ldc + j * N) : (VEC){0};               \
    for (long k = x->depth; k > 0; k--, a += ak, b += ldb) {                                   \
      VEC row_of_b[4];                                                                         \
      _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++) {                                 \
        row_of_b[j] = *(const VEC *)(b + j * N);                                               \
        IN_REGISTER(row_of_b[j]);                                                              \
      }                                                                                        \
      _Pragma("GCC unroll 8") for (int i = 0; i < tall; i++) {                                 \
        const VEC number = a[i * ai] - (VEC){0};                                               \
        _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++) sum[i][j] += number * row_of_b[j]; \
      }                                                                                        \
    }                                                                                          \
    _Pragma("GCC unroll 8") for (int i = 0; i < tall; i++)                                     \
        _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++)                                 \
            *(VEC *)(c + i * ldc + j * N) = sum[i][j];                                         \
  }
DEFINE_BLOCK(block, vec, LANES)
DEFINE_BLOCK(half_block, half_vec, HALF)

#define TALLEST (WIDE == 4 ? 6 : 4)
#define DEFINE_STRIP(NAME, BLOCK, WIDTH, MOST)                      \
  static __attribute__((noinline)) void NAME(Product x, long m) {   \
    long i = 0;                                                     \
    for (; i + MOST <= m; i += MOST) BLOCK(MOST, WIDTH, &x, i);     \
    if (i + 4 <= m) BLOCK(4, WIDTH, &x, i), i += 4;                 \
    if (i + 2 <= m) BLOCK(2, WIDTH, &x, i), i += 2;                 \
    if (i < m) BLOCK(1, WIDTH, &x, i);                              \
  }
DEFINE_STRIP(strip4, block, 4, TALLEST)
DEFINE_STRIP(strip2, block, 2, TALLEST)
DEFINE_STRIP(strip1, block, 1, 8)
DEFINE_STRIP(half_strip, half_block, 1, 8)

/* m rows of C, n columns. */
static void multiply(Product x, long m, long n) {
  for (; n >= 4 * LANES && WIDE == 4; n -= 4 * LANES, x.b += 4 * LANES, x.c += 4 * LANES)
    strip4(x, m);
  for (; n >= 2 * LANES; n -= 2 * LANES, x.b += 2 * LANES, x.c += 2 * LANES) strip2(x, m);
  for (; n >= LANES; n -= LANES, x.b += LANES, x.c += LANES) strip1(x, m);
  for (; n > 0; n -= HALF, x.b += HALF, x.c += HALF) half_strip(x, m);
}

/* ---- Transposition ---- */

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
/* In each pair of groups of s lanes: the first of a and of b; the second of a and of b. */
#if LANES == 16
#define FIRST1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define SECOND1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define FIRST2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SECOND2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define FIRST4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define SECOND4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define FIRST8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define SECOND8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#elif LANES == 8
#define FIRST1(a, b) SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define SECOND1(a, b) SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#define FIRST2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define FIRST4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define SECOND4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define FIRST1(a, b) SHUFFLE(a, b, 0, 4, 2, 6)
#define SECOND1(a, b) SHUFFLE(a, b, 1, 5, 3, 7)
#define FIRST2(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define SECOND2(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#endif

#define EXCHANGE(s)                                             \
  _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) {    \
    if (i & s) continue;                                        \
    const vec a = r[i], b = r[i | s];                           \
    r[i] = FIRST##s(a, b);                                      \
    r[i | s] = SECOND##s(a, b);                                 \
  }

/* in [n, d] -> out [d, n], both whole vectors. */
static void transpose(long n, long d, const float *in, long ldi, float *out, long ldo) {
  for (long row = 0; row < n; row += LANES)
    for (long column = 0; column < d; column += LANES) {
      vec r[LANES];
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
          r[i] = load(in + (row + i) * ldi + column);
      EXCHANGE(1)
      EXCHANGE(2)
#if LANES > 4
      EXCHANGE(4)
#endif
#if LANES > 8
      EXCHANGE(8)
#endif
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
          store(out + (column + i) * ldo + row, r[i]);
    }
}

/* ---- Softmax ---- */

/* exp(x) for x <= 0, within 2e-7 of it; what lies below -87 counts as -87. */
static vec exponential(vec x) {
  x = larger(all(-87.0f), x); /* the second argument if they do not compare: NaN stays */
  const vec shift = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
  const vec n = (x * 1.44269504f + shift) - shift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* x - n ln 2, ln 2 in two parts */
  vec p = r * 1.38368318e-3f + 8.37482419e-3f; /* least relative error for |r| <= ln 2 / 2 */
  p = p * r + 4.16682251e-2f;
  p = p * r + 0.166664198f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

/* Down each column of p [rows, n]. */
static void softmax(long rows, long n, float *p) {
  for (long j = 0; j < n; j += LANES) {
    vec most = load(p + j), other = most;
    long i = 1;
    for (; i + 1 < rows; i += 2) {
      most = larger(load(p + i * n + j), most);
      other = larger(load(p + (i + 1) * n + j), other);
    }
    if (i < rows) most = larger(load(p + i * n + j), most);
    most = larger(other, most);
    vec sum = {0};
    for (i = 0; i < rows; i++) {
      const vec e = exponential(load(p + i * n + j) - most);
      store(p + i * n + j, e);
      sum += e;
    }
    sum = 1.0f / sum;
    for (i = 0; i < rows; i++) store(p + i * n + j, load(p + i * n + j) * sum);
  }
}

/* Down each column: d = the gradient of p -> the gradient of the scores. */
static void softmax_backward(long rows, long n, const float *p, float *d) {
  for (long j = 0; j < n; j += LANES) {
    vec sum = {0}, other = {0};
    long i = 0;
    for (; i + 1 < rows; i += 2) {
      sum += load(p + i * n + j) * load(d + i * n + j);
      other += load(p + (i + 1) * n + j) * load(d + (i + 1) * n + j);
    }
    if (i < rows) sum += load(p + i * n + j) * load(d + i * n + j);
    sum += other;
    for (i = 0; i < rows; i++) store(d + i * n + j, load(p + i * n + j) * (load(d + i * n + j) - sum));
  }
}

/* ---- Sequences where they lie ---- */

/* Sequences numbered by three indices; a class token, where there is one, is the first row of each
   and lies elsewhere. Strides in bytes; numbers in a row are next to each other. */
typedef struct {
  char *rows;
  int64_t at[3], row;
  char *cls;
  int64_t cls_at[3];
  int64_t half, half_cls; /* bfloat16, else float */
} Tensor;

typedef struct {
  int64_t n[3]; /* sequences along each index */
  int64_t queries, keys; /* rows beside the class token */
  int64_t width;
  int64_t fold; /* channels of keys and values that are the next frame's */
  int64_t shared; /* queries are the same for all values of the second index */
  int64_t threads;
  float *kept; /* [sequence, keys * queries rounded up], probabilities from attend, or NULL */
} Shape;

static long length(long rows, const Tensor *x) { return rows + (x->cls != NULL); }

static char *row_of(const Tensor *x, const int64_t *at, long i, int *half) {
  *half = x->cls != NULL && i == 0 ? x->half_cls : x->half;
  if (x->cls != NULL && i-- == 0)
    return x->cls + at[0] * x->cls_at[0] + at[1] * x->cls_at[1] + at[2] * x->cls_at[2];
  return x->rows + at[0] * x->at[0] + at[1] * x->at[1] + at[2] * x->at[2] + i * x->row;
}

static float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

static uint16_t narrowed(float x) { /* to the nearest bfloat16, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static void read_numbers(const void *from, int half, long n, float scale, float *to) {
  if (half)
    for (long i = 0; i < n; i++) to[i] = scale * widened(((const uint16_t *)from)[i]);
  else
    for (long i = 0; i < n; i++) to[i] = scale * ((const float *)from)[i];
}

static void write_numbers(const float *from, float scale, long n, int half, void *to) {
  if (half)
    for (long i = 0; i < n; i++) ((uint16_t *)to)[i] = narrowed(scale * from[i]);
  else
    for (long i = 0; i < n; i++) ((float *)to)[i] = scale * from[i];
}

/* Row i of a buffer lies at i * stride; columns from `width` on are left alone, and stay zero. */
static void read(const Tensor *x, const int64_t *at, long rows, long width, float scale, float *to,
                 long stride) {
  int half;
  for (long i = 0; i < rows; i++) {
    const char *from = row_of(x, at, i, &half);
    read_numbers(from, half, width, scale, to + i * stride);
  }
}

static void write(const Tensor *x, const int64_t *at, long first, long rows, long width, float scale,
                  const float *from, long stride) {
  int half;
  for (long i = 0; i < rows; i++) {
    char *to = row_of(x, at, first + i, &half);
    write_numbers(from + i * stride, scale, width, half, to);
  }
}

/* Channels of keys and values from other frames, the second index: counted over all heads, the
   third, the first `fold` are the next frame's and as many after them those of the frame before,
   with zeros beyond the ends. Returns where the run ends that begins at channel d of a head. */
static long run_of_channels(const Shape *s, const int64_t *at, long d, int64_t *from) {
  const long channel = at[2] * s->width + d;
  const long by = channel < s->fold ? 1 : channel < 2 * s->fold ? -1 : 0;
  const long end = channel < s->fold ? s->fold : 2 * s->fold;
  from[0] = at[0], from[1] = at[1] + by, from[2] = at[2];
  return by && end - channel < s->width - d ? d + end - channel : s->width;
}

static void read_shifted(const Shape *s, const Tensor *x, const int64_t *at, long rows, float *to,
                         long stride) {
  int64_t from[3];
  int half;
  for (long d = 0, end; d < s->width; d = end) {
    end = run_of_channels(s, at, d, from);
    const int there = from[1] >= 0 && from[1] < s->n[1];
    for (long i = 0; i < rows; i++) {
      if (there) {
        const char *row = row_of(x, from, i, &half);
        read_numbers(row + d * (half ? 2 : 4), half, end - d, 1, to + i * stride + d);
      } else
        memset(to + i * stride + d, 0, 4 * (end - d));
    }
  }
}

/* Gradients go where the channels came from; what came from beyond one end leaves zeros at the
   other, in the frame that nobody saw. */
static void write_shifted(const Shape *s, const Tensor *x, const int64_t *at, long rows,
                          const float *from, long stride) {
  int64_t to[3];
  int half;
  for (long d = 0, end; d < s->width; d = end) {
    end = run_of_channels(s, at, d, to);
    const int there = to[1] >= 0 && to[1] < s->n[1];
    if (!there) to[1] = (to[1] + s->n[1]) % s->n[1];
    for (long i = 0; i < rows; i++) {
      char *row = row_of(x, to, i, &half);
      row += d * (half ? 2 : 4);
      if (there)
        write_numbers(from + i * stride + d, 1, end - d, half, row);
      else
        memset(row, 0, (end - d) * (half ? 2 : 4));
    }
  }
}

/* A thread's buffer, or NULL and a note of it. */
static float *zeroed(long floats, int *failed) {
  const long bytes = round_up(floats * 4, 64);
  float *buffer = aligned_alloc(64, bytes);
  if (buffer != NULL) return memset(buffer, 0, bytes);
#pragma omp atomic write
  *failed = 1;
  return NULL;
}

/* ---- Attention ---- */

/* out = softmax(scale q k^T) v for x = q, k, v, out. Returns 0, or 1 if memory ran out. */
int attend(const void *numbers, float scale) {
  const Shape *s = numbers;
  const Tensor *x = (const Tensor *)(s + 1);
  const long queries = length(s->queries, x), keys = length(s->keys, x + 1), width = s->width;
  const long D = round_up(width, LANES), Q = round_up(queries, LANES);
  const long sequences = s->n[0] * s->n[1] * s->n[2];
  int failed = 0;
#pragma omp parallel num_threads(s->threads)
  {
    float *q = zeroed(Q * D + 2 * keys * D + D * TILE + keys * TILE + TILE * D, &failed);
    float *k = q + Q * D, *v = k + keys * D, *asking = v + keys * D;
    float *tile = asking + D * TILE, *out = tile + keys * TILE;
#pragma omp for schedule(static)
    for (long sequence = 0; sequence < sequences; sequence++) {
      const int64_t at[3] = {sequence / s->n[2] / s->n[1], sequence / s->n[2] % s->n[1],
                             sequence % s->n[2]};
      if (q == NULL) continue;
      read(x, at, queries, width, scale, q, D);
      read_shifted(s, x + 1, at, keys, k, D);
      read_shifted(s, x + 2, at, keys, v, D);
      for (long first = 0; first < queries; first += TILE) {
        const long n = queries - first < TILE ? queries - first : TILE, np = round_up(n, LANES);
        float *p = s->kept ? s->kept + keys * (sequence * Q + first) : tile;
        transpose(np, D, q + first * D, D, asking, np);
        multiply((Product){k, D, 1, asking, np, p, np, width, 0}, keys, round_up(n, HALF));
        softmax(keys, np, p);
        multiply((Product){p, 1, np, v, D, out, D, keys, 0}, n, D);
        write(x + 3, at, first, n, width, 1, out, D);
      }
    }
    free(q);
  }
  return failed;
}

/* Gradients of q, k, v for x = q, k, v, d out, dq, dk, dv. Where queries are shared, dq is
   the sum of what each value of the second index gives. */
int attend_backward(const void *numbers, float scale) {
  const Shape *s = numbers;
  const Tensor *x = (const Tensor *)(s + 1);
  const long queries = length(s->queries, x), keys = length(s->keys, x + 1), width = s->width;
  const long D = round_up(width, LANES), Q = round_up(queries, LANES);
  const long middle = s->shared ? s->n[1] : 1;
  const long tasks = s->n[0] * s->n[1] * s->n[2] / middle;
  int failed = 0;
#pragma omp parallel num_threads(s->threads)
  {
    float *q = zeroed(3 * Q * D + 4 * keys * D + 2 * D * TILE + 2 * keys * TILE, &failed);
    float *g = q + Q * D, *dq = g + Q * D, *k = dq + Q * D, *v = k + keys * D;
    float *dk = v + keys * D, *dv = dk + keys * D;
    float *asking = dv + keys * D, *grads = asking + D * TILE;
    float *tile = grads + D * TILE, *ds = tile + keys * TILE;
#pragma omp for schedule(static)
    for (long task = 0; task < tasks; task++) {
      const long frames = s->n[1] / middle;
      int64_t at[3] = {task / s->n[2] / frames, task / s->n[2] % frames, task % s->n[2]};
      if (q == NULL) continue;
      read(x, at, queries, width, scale, q, D);
      for (long i = 0; i < middle; i++) {
        if (s->shared) at[1] = i;
        const long sequence = (at[0] * s->n[1] + at[1]) * s->n[2] + at[2];
        read_shifted(s, x + 1, at, keys, k, D);
        read_shifted(s, x + 2, at, keys, v, D);
        read(x + 3, at, queries, width, 1, g, D);
        for (long first = 0; first < queries; first += TILE) {
          const long n = queries - first < TILE ? queries - first : TILE, np = round_up(n, LANES);
          const long nh = round_up(n, HALF), start = first * D;
          const int more = first > 0;
          float *p = s->kept ? s->kept + keys * (sequence * Q + first) : tile;
          if (!s->kept) {
            transpose(np, D, q + start, D, asking, np);
            multiply((Product){k, D, 1, asking, np, p, np, width, 0}, keys, nh);
            softmax(keys, np, p);
          }
          transpose(np, D, g + start, D, grads, np);
          multiply((Product){p, np, 1, g + start, D, dv, D, n, more}, keys, D);
          multiply((Product){v, D, 1, grads, np, ds, np, width, 0}, keys, nh);
          softmax_backward(keys, np, p, ds);
          multiply((Product){ds, np, 1, q + start, D, dk, D, n, more}, keys, D);
          multiply((Product){ds, 1, np, k, D, dq + start, D, keys, i > 0}, n, D);
        }
        write_shifted(s, x + 5, at, keys, dk, D);
        write_shifted(s, x + 6, at, keys, dv, D);
      }
      write(x + 4, at, 0, queries, width, scale, dq, D);
    }
    free(q);
  }
  return failed;
}

/* ---- The second step of trajectory attention ---- */

/* For each of n tokens: answers x [T, C] from all frames, absorbed queries a [H, C], probabilities
   p [H, T] over the frames. Tokens follow each other; heads of a, and of `mixed`, are `apart`. */
typedef struct {
  int64_t n, T, H, D, apart, projected, threads;
} Along;

static float sum_of(vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* dots[j] = a . b[j] for j < count, numbers in whole vectors. */
static void dot_products(const float *a, const float *b, long ldb, long count, long numbers,
                         float *dots) {
  for (long j = 0; j < count; j += 4, b += 4 * ldb) {
    vec sum[4] = {{0}};
    const long n = count - j < 4 ? count - j : 4;
    if (n == 4)
      for (long c = 0; c < numbers; c += LANES)
        for (int i = 0; i < 4; i++) sum[i] += load(a + c) * load(b + i * ldb + c);
    else
      for (int i = 0; i < n; i++)
        for (long c = 0; c < numbers; c += LANES) sum[i] += load(a + c) * load(b + i * ldb + c);
    for (int i = 0; i < n; i++) dots[j + i] = sum_of(sum[i]);
  }
}

/* p = softmax over T of scale a . x; then out [n, H, D], the sum over T of p and that head's part of
   x, or, if projected, out [H, n, C], the same of the whole of x. */
int along(const Along *s, const float *x, const float *a, float scale, float *p, float *out) {
  const long T = s->T, H = s->H, D = s->D, C = H * D;
  int failed = 0;
#pragma omp parallel num_threads(s->threads)
  {
    float *scores = zeroed(round_up(T, LANES), &failed);
#pragma omp for schedule(static)
    for (long i = 0; i < s->n; i++) {
      const float *xi = x + i * T * C;
      float *pi = p + i * H * T;
      if (scores == NULL) continue;
      for (long h = 0; h < H; h++) {
        dot_products(a + h * s->apart + i * C, xi, C, T, C, scores);
        float most = scale * scores[0], sum = 0;
        for (long t = 1; t < T; t++) most = scale * scores[t] > most ? scale * scores[t] : most;
        for (long t = 0; t < T; t += LANES)
          store(scores + t, exponential(load(scores + t) * scale - most));
        for (long t = 0; t < T; t++) sum += scores[t];
        for (long t = 0; t < T; t++) pi[h * T + t] = scores[t] / sum;
        if (!s->projected)
          multiply((Product){pi + h * T, T, 1, xi + h * D, C, out + i * C + h * D, D, T, 0}, 1, D);
      }
      if (s->projected) multiply((Product){pi, T, 1, xi, C, out + i * C, s->apart, T, 0}, H, C);
    }
    free(scores);
  }
  return failed;
}

/* From g = d out, laid out as out: dx like x and da like a. */
int along_backward(const Along *s, const float *x, const float *a, float scale, const float *p,
                   const float *g, float *dx, float *da) {
  const long T = s->T, H = s->H, D = s->D, C = H * D;
  int failed = 0;
#pragma omp parallel num_threads(s->threads)
  {
    float *ds = zeroed(H * T, &failed);
#pragma omp for schedule(static)
    for (long i = 0; i < s->n; i++) {
      const float *xi = x + i * T * C, *pi = p + i * H * T;
      float *dxi = dx + i * T * C;
      if (ds == NULL) continue;
      for (long h = 0; h < H; h++) {
        float *of_head = ds + h * T, sum = 0;
        if (s->projected)
          dot_products(g + h * s->apart + i * C, xi, C, T, C, of_head);
        else
          dot_products(g + i * C + h * D, xi + h * D, C, T, D, of_head);
        for (long t = 0; t < T; t++) sum += pi[h * T + t] * of_head[t];
        for (long t = 0; t < T; t++) of_head[t] = pi[h * T + t] * (of_head[t] - sum) * scale;
      }
      multiply((Product){ds, 1, T, a + i * C, s->apart, dxi, C, H, 0}, T, C);
      multiply((Product){ds, T, 1, xi, C, da + i * C, s->apart, T, 0}, H, C);
      if (s->projected)
        multiply((Product){pi, 1, T, g + i * C, s->apart, dxi, C, H, 1}, T, C);
      else
        for (long h = 0; h < H; h++)
          multiply((Product){pi + h * T, 1, T, g + i * C + h * D, D, dxi + h * D, C, 1, 1}, T, D);
    }
    free(ds);
  }
  return failed;
}

int lanes(void) { return LANES; }
