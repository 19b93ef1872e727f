// y = x Wᵀ + bias with W in 8 bits and x in bfloat16 or float32, on CPUs with AVX-512 VNNI.
//
// The instruction multiplies unsigned by signed 8-bit numbers. So weights are stored with 128 added, and each row of x
// is rounded to 16 bits relative to its largest number and split into two planes of 8 bits: x = step (256 high + low).
// Sums are integers: a row's result does not depend on the other rows or on the number of threads.
//
// Weights come in blocks of 16 output features: [out / 16, in / 4, 16, 4], both sizes padded to a multiple of 16.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBlock = 16;

struct BFloat16 {
  uint16_t bits;
};

__m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

__m512 load(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

void store(float* p, __mmask16 mask, __m512 y) { _mm512_mask_storeu_ps(p, mask, y); }

void store(BFloat16* p, __mmask16 mask, __m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

__mmask16 first(int64_t count) { return count >= kBlock ? 0xffff : (1u << count) - 1; }

// The two planes of a row of x, interleaved by row: [2, in], with the sums that undo the 128 added to weights.
struct Row {
  const int8_t* planes;
  int32_t sums[2];
  float step;  // not a number if any number of the row is not finite
};

template <typename T>
Row split(const T* x, int64_t in, int64_t width, int8_t* planes) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < in; i += kBlock) {
    const __m512i bits = _mm512_castps_si512(load(x + i, first(in - i)));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  float size;
  std::memcpy(&size, &bits, sizeof size);
  const bool finite = bits < 0x7f800000u, zero = size < 1e-30f;
  Row row{planes, {0, 0}, finite ? size / 32639 : __builtin_nanf("")};
  const __m512 factor = _mm512_set1_ps(finite && !zero ? 32639 / size : 0);
  __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
  for (int64_t i = 0; i < width; i += kBlock) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, first(std::max<int64_t>(in - i, 0))), factor));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + width + i), _mm512_cvtepi32_epi8(low));
    high_sum = _mm512_add_epi32(high_sum, high);
    low_sum = _mm512_add_epi32(low_sum, low);
  }
  row.sums[0] = _mm512_reduce_add_epi32(high_sum);
  row.sums[1] = _mm512_reduce_add_epi32(low_sum);
  return row;
}

// 16 output features of R rows. With few rows several sums are kept for each, to hide the instruction's latency.
template <int R, typename T>
void block(const Row* rows, int64_t width, const uint8_t* weights, __m512 scales, __m512 bias, T* y, int64_t out,
           __mmask16 mask) {
  constexpr int kSums = R == 1 ? 4 : R == 2 ? 2 : 1;
  __m512i sums[kSums][R][2];
  for (auto& one : sums)
    for (auto& row : one) row[0] = row[1] = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 4 * kSums)
    for (int s = 0; s < kSums; s++) {
      const __m512i w = _mm512_loadu_si512(weights + (i + 4 * s) * kBlock);
      for (int r = 0; r < R; r++)
        for (int p = 0; p < 2; p++) {
          int32_t four;
          std::memcpy(&four, rows[r].planes + p * width + i + 4 * s, sizeof four);
          sums[s][r][p] = _mm512_dpbusd_epi32(sums[s][r][p], w, _mm512_set1_epi32(four));
        }
    }
  for (int r = 0; r < R; r++) {
    __m512 planes[2];
    for (int p = 0; p < 2; p++) {
      __m512i sum = _mm512_set1_epi32(-128 * rows[r].sums[p]);
      for (int s = 0; s < kSums; s++) sum = _mm512_add_epi32(sum, sums[s][r][p]);
      planes[p] = _mm512_cvtepi32_ps(sum);
    }
    const __m512 whole = _mm512_fmadd_ps(planes[0], _mm512_set1_ps(256), planes[1]);
    const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(whole, _mm512_set1_ps(rows[r].step)), scales);
    store(y + r * out, mask, _mm512_add_ps(scaled, bias));
  }
}

template <typename T>
void linear(const T* x, int64_t count, int64_t in, const uint8_t* weights, const float* scales, const float* bias,
            T* y, int64_t out, int threads) {
  const int64_t width = (in + kBlock - 1) / kBlock * kBlock, blocks = (out + kBlock - 1) / kBlock;
  std::vector<int8_t> planes(2 * width * count);
  std::vector<Row> rows(count);
  for (int64_t r = 0; r < count; r++) rows[r] = split(x + r * in, in, width, planes.data() + 2 * width * r);
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks * width * count > 1 << 14)
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* w = weights + b * kBlock * width;
    const __m512 own = _mm512_loadu_ps(scales + b * kBlock), shift = _mm512_loadu_ps(bias + b * kBlock);
    const __mmask16 mask = first(out - b * kBlock);
    T* place = y + b * kBlock;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) block<4>(&rows[r], width, w, own, shift, place + r * out, out, mask);
    for (; r + 2 <= count; r += 2) block<2>(&rows[r], width, w, own, shift, place + r * out, out, mask);
    if (r < count) block<1>(&rows[r], width, w, own, shift, place + r * out, out, mask);
  }
}

}  // namespace

// x [count, in], scales and bias float32 [out, padded], y [count, out].
extern "C" void int8_linear(int half, const void* x, int64_t count, int64_t in, const uint8_t* weights,
                            const float* scales, const float* bias, void* y, int64_t out, int threads) {
  if (half)
    linear(static_cast<const BFloat16*>(x), count, in, weights, scales, bias, static_cast<BFloat16*>(y), out, threads);
  else
    linear(static_cast<const float*>(x), count, in, weights, scales, bias, static_cast<float*>(y), out, threads);
}
