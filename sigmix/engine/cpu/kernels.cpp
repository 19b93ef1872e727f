// Kernels of a decode step on CPUs with AVX-512: linear layers, attention, and the choice of the most probable token.
//
// Linear layers y = x Wᵀ + bias have weights in blocks of 16 output features:
//
//   bfloat16  [out / 16, in / 2, 16, 2], out padded to a multiple of 16, in even; x in bfloat16 (AMX, or AVX-512 BF16)
//   8 bits    [out / 16, in / 4, 16, 4], both sizes padded to a multiple of 16; x in bfloat16 or float32 (AVX-512 VNNI)
//
// A row's result does not depend on the other rows or on the number of threads, bit for bit.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// One layer, as in sigmix/engine/cpu/native.py. No scales: the weights are in bfloat16. The bias [out, padded] may be null.
struct Linear {
  int64_t in, out;
  const void* weights;
  const float *scales, *bias;
};

namespace {

constexpr int kBlock = 16;
constexpr int64_t kParallel = 1 << 18;  // multiplications that are worth a second thread

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

__m512 bias_of(const Linear& layer, int64_t block) {
  return layer.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(layer.bias + block * kBlock);
}

#ifdef __AVX512BF16__

// B blocks of output features of R rows.
template <int R, int B>
void bf16_tile(const Linear& layer, const BFloat16* x, int64_t first_block, BFloat16* y) {
  const int64_t in = layer.in;
  const auto* weights = static_cast<const BFloat16*>(layer.weights) + first_block * kBlock * in;
  __m512 sums[R][B];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < in; i += 2) {
    __m512i w[B];
    for (int b = 0; b < B; b++) w[b] = _mm512_loadu_si512(weights + (b * in + i) * kBlock);
    for (int r = 0; r < R; r++) {
      int32_t two;
      std::memcpy(&two, x + r * in + i, sizeof two);
      for (int b = 0; b < B; b++)
        sums[r][b] = _mm512_dpbf16_ps(sums[r][b], (__m512bh)w[b], (__m512bh)_mm512_set1_epi32(two));
    }
  }
  for (int b = 0; b < B; b++) {
    const int64_t feature = (first_block + b) * kBlock;
    for (int r = 0; r < R; r++)
      store(y + r * layer.out + feature, first(layer.out - feature),
            _mm512_add_ps(sums[r][b], bias_of(layer, first_block + b)));
  }
}

constexpr int kRows = 8, kBlocks = 3;  // of a tile: 24 sums in registers

template <int B, int R = kRows>
void bf16_rows(const Linear& layer, const BFloat16* x, int64_t count, int64_t block, BFloat16* y) {
  for (; count >= R; count -= R, x += R * layer.in, y += R * layer.out) bf16_tile<R, B>(layer, x, block, y);
  if constexpr (R > 1) bf16_rows<B, R - 1>(layer, x, count, block, y);
}

#ifdef __AMX_BF16__

// Tiles: sums of two blocks of output features in two groups of 16 rows, two tiles of x, two of weights.
constexpr int kTileIn = 32;  // input features of a tile
constexpr int64_t kTileRows = 2 * kBlock;

// Linux grants the state of tiles to a process that requests it.
bool has_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// Set the sizes of tiles for up to 32 rows of x. Tiles of an empty second group have one row and are unused.
void configure_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const auto upper = static_cast<uint8_t>(std::min<int64_t>(rows, kBlock));
  const auto lower = static_cast<uint8_t>(std::max<int64_t>(rows - kBlock, 1));
  for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64;
  for (const int tile : {0, 1, 4}) config.rows[tile] = upper;
  for (const int tile : {2, 3, 5}) config.rows[tile] = lower;
  for (const int tile : {6, 7}) config.rows[tile] = kBlock;
  _tile_loadconfig(&config);
}

// Weights are read once in a decode step; the tiles' loads alone leave a third of the memory's speed unused.
void prefetch_tile(const BFloat16* tile) {
  constexpr int kAhead = 4;  // tiles
  for (int row = 0; row < kBlock; row++) _mm_prefetch(tile + (kAhead * kBlock + row) * kTileIn, _MM_HINT_T0);
}

// B blocks of output features, 1 or 2, of R groups of rows, 1 or 2; count: rows in all.
template <int R, int B>
void amx_tile(const Linear& layer, const BFloat16* x, int64_t count, int64_t first_block, BFloat16* y) {
  const int64_t in = layer.in;
  const size_t stride = in * sizeof(BFloat16);
  const auto* weights = static_cast<const BFloat16*>(layer.weights) + first_block * kBlock * in;
  _tile_zero(0);
  if constexpr (B == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && B == 2) _tile_zero(3);
  for (int64_t i = 0; i < in; i += kTileIn) {
    prefetch_tile(weights + i * kBlock);
    if constexpr (B == 2) prefetch_tile(weights + (in + i) * kBlock);
    _tile_loadd(6, weights + i * kBlock, 64);
    _tile_loadd(4, x + i, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (B == 2) {
      _tile_loadd(7, weights + (in + i) * kBlock, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, x + kBlock * in + i, stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (B == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[R][B][kBlock][kBlock];
  _tile_stored(0, sums[0][0], 64);
  if constexpr (B == 2) _tile_stored(1, sums[0][1], 64);
  if constexpr (R == 2) _tile_stored(2, sums[1][0], 64);
  if constexpr (R == 2 && B == 2) _tile_stored(3, sums[1][1], 64);
  for (int b = 0; b < B; b++) {
    const int64_t feature = (first_block + b) * kBlock;
    const __m512 bias = bias_of(layer, first_block + b);
    for (int64_t r = 0; r < count; r++)
      store(y + r * layer.out + feature, first(layer.out - feature),
            _mm512_add_ps(_mm512_load_ps(sums[r / kBlock][b][r % kBlock]), bias));
  }
}

template <int B>
void amx_rows(const Linear& layer, const BFloat16* x, int64_t count, int64_t block, BFloat16* y) {
  if (count > kBlock) amx_tile<2, B>(layer, x, count, block, y);
  else amx_tile<1, B>(layer, x, count, block, y);
}

void amx_linear(const Linear& layer, const BFloat16* x, int64_t count, BFloat16* y, int threads) {
  constexpr int64_t kCached = 1 << 19;  // bytes of weights that stay in a core's cache while all rows pass
  const int64_t blocks = (layer.out + kBlock - 1) / kBlock, pairs = (blocks + 1) / 2;
  const int64_t chunk = std::max<int64_t>(kCached / (2 * kBlock * layer.in * sizeof(BFloat16)), 1);
#pragma omp parallel num_threads(threads) if (layer.in * layer.out * count > kParallel)
  {
    const int64_t share = (pairs + omp_get_num_threads() - 1) / omp_get_num_threads();
    const int64_t begin = omp_get_thread_num() * share, end = std::min(begin + share, pairs);
    for (int64_t start = begin; start < end; start += chunk)
      for (int64_t part = 0; part < count; part += kTileRows) {
        const int64_t rows = std::min(count - part, kTileRows);
        const BFloat16* from = x + part * layer.in;
        BFloat16* to = y + part * layer.out;
        configure_tiles(rows);
        for (int64_t pair = start; pair < std::min(start + chunk, end); pair++) {
          if (2 * pair + 1 < blocks) amx_rows<2>(layer, from, rows, 2 * pair, to);
          else amx_rows<1>(layer, from, rows, 2 * pair, to);
        }
      }
    _tile_release();
  }
}

#endif

void bf16_linear(const Linear& layer, const BFloat16* x, int64_t count, BFloat16* y, int threads) {
#ifdef __AMX_BF16__
  if (layer.in % kTileIn == 0 && has_tiles()) return amx_linear(layer, x, count, y, threads);
#endif
  const int64_t blocks = (layer.out + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (layer.in * layer.out * count > kParallel)
  for (int64_t block = 0; block < blocks; block += kBlocks) {
    if (blocks - block >= 3) bf16_rows<3>(layer, x, count, block, y);
    if (blocks - block == 2) bf16_rows<2>(layer, x, count, block, y);
    if (blocks - block == 1) bf16_rows<1>(layer, x, count, block, y);
  }
}

#endif

#ifdef __AVX512VNNI__

// The instruction multiplies unsigned by signed 8-bit numbers. So weights are stored with 128 added, and each row of x
// is rounded to 16 bits relative to its largest number and split into two planes of 8 bits: x = step (256 high + low).
// Sums are integers.

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
void int8_linear(const Linear& layer, const T* x, int64_t count, T* y, int threads) {
  const int64_t in = layer.in, out = layer.out;
  const int64_t width = (in + kBlock - 1) / kBlock * kBlock, blocks = (out + kBlock - 1) / kBlock;
  std::vector<int8_t> planes(2 * width * count);
  std::vector<Row> rows(count);
  for (int64_t r = 0; r < count; r++) rows[r] = split(x + r * in, in, width, planes.data() + 2 * width * r);
#pragma omp parallel for num_threads(threads) schedule(static) if (in * out * count > kParallel)
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* w = static_cast<const uint8_t*>(layer.weights) + b * kBlock * width;
    const __m512 own = _mm512_loadu_ps(layer.scales + b * kBlock), shift = bias_of(layer, b);
    const __mmask16 mask = first(out - b * kBlock);
    T* place = y + b * kBlock;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) block<4>(&rows[r], width, w, own, shift, place + r * out, out, mask);
    for (; r + 2 <= count; r += 2) block<2>(&rows[r], width, w, own, shift, place + r * out, out, mask);
    if (r < count) block<1>(&rows[r], width, w, own, shift, place + r * out, out, mask);
  }
}

#endif

// Returns false if the machine or the dtype of x does not suit the weights.
bool run(const Linear& layer, bool half, const void* x, int64_t count, void* y, int threads) {
  auto* half_x = static_cast<const BFloat16*>(x);
  auto* half_y = static_cast<BFloat16*>(y);
#ifdef __AVX512VNNI__
  if (layer.scales != nullptr && half) return int8_linear(layer, half_x, count, half_y, threads), true;
  if (layer.scales != nullptr)
    return int8_linear(layer, static_cast<const float*>(x), count, static_cast<float*>(y), threads), true;
#endif
#ifdef __AVX512BF16__
  if (layer.scales == nullptr && half) return bf16_linear(layer, half_x, count, half_y, threads), true;
#endif
  return false;
}

// e^x for x <= 0: Taylor's polynomial of degree 7 for |r| <= ln 2 / 2, which leaves out less than 1e-8 of the value.
__m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// The first index of the largest of some logits, and its log-probability; not a number if one of them is not.
void greedy_row(const BFloat16* logits, int64_t count, int64_t* token, float* logprob) {
  const __m512 least = _mm512_set1_ps(-__builtin_inff());
  __m512 largest = least;
  for (int64_t i = 0; i < count; i += kBlock) {
    const __mmask16 mask = first(count - i);
    largest = _mm512_mask_max_ps(largest, mask, largest, load(logits + i, mask));
  }
  const float best = _mm512_reduce_max_ps(largest);
  *token = count;
  double total = 0;
  for (int64_t start = 0; start < count; start += 64 * kBlock) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = start; i < std::min(start + 64 * kBlock, count); i += kBlock) {
      const __mmask16 mask = first(count - i);
      const __m512 x = load(logits + i, mask);
      const __mmask16 same = _mm512_mask_cmpeq_ps_mask(mask, x, _mm512_set1_ps(best));
      if (same && *token == count) *token = i + __builtin_ctz(same);
      sum = _mm512_mask_add_ps(sum, mask, sum, exponential(_mm512_sub_ps(x, _mm512_set1_ps(best))));
    }
    total += _mm512_reduce_add_ps(sum);
  }
  if (*token == count) *token = 0;  // no number at all
  *logprob = -std::log(total);
}

// Attention of one query to its head's keys and values: softmax(scale q Kᵀ) V.
struct Attention {
  int64_t columns, width, out, key_stride, value_stride;
  float scale, softcap;  // 0: no cap
};

// Whole: the width of keys is a multiple of 16, and that of values one of 64, so that no mask is needed.
template <bool Whole, typename T>
void attend(const Attention& a, const T* query, const T* keys, const T* values, const bool* mask, T* output) {
  constexpr int kPart = 4 * kBlock;
  const __m512 least = _mm512_set1_ps(-__builtin_inff());
  std::vector<float> scores(a.columns + kBlock, -__builtin_inff());
  for (int64_t p = 0; p < a.columns; p++) {
    if (!mask[p]) continue;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.width; i += kBlock) {
      const __mmask16 part = Whole ? 0xffff : first(a.width - i);
      sum = _mm512_fmadd_ps(load(query + i, part), load(keys + p * a.key_stride + i, part), sum);
    }
    scores[p] = a.scale * _mm512_reduce_add_ps(sum);
    if (a.softcap != 0) scores[p] = a.softcap * std::tanh(scores[p] / a.softcap);
  }
  __m512 largest = least, total = _mm512_setzero_ps();
  for (int64_t p = 0; p < a.columns; p += kBlock) largest = _mm512_max_ps(largest, _mm512_loadu_ps(&scores[p]));
  const __m512 best = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (int64_t p = 0; p < a.columns; p += kBlock) {
    const __m512 share = exponential(_mm512_sub_ps(_mm512_loadu_ps(&scores[p]), best));
    total = _mm512_add_ps(total, share);
    _mm512_storeu_ps(&scores[p], share);
  }
  const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
  for (int64_t i = 0; i < a.out; i += kPart) {
    __m512 means[4];
    for (auto& mean : means) mean = _mm512_setzero_ps();
    for (int64_t p = 0; p < a.columns; p++) {
      if (!mask[p]) continue;
      const __m512 share = _mm512_set1_ps(scores[p]);
      for (int j = 0; j < 4; j++) {
        const int64_t place = i + j * kBlock;
        const __mmask16 part = Whole ? 0xffff : place < a.out ? first(a.out - place) : 0;
        means[j] = _mm512_fmadd_ps(share, load(values + p * a.value_stride + place, part), means[j]);
      }
    }
    for (int j = 0; j < 4 && i + j * kBlock < a.out; j++)
      store(output + i + j * kBlock, first(a.out - i - j * kBlock), _mm512_div_ps(means[j], sum));
  }
}

// Data, sizes and strides of a tensor of four dimensions.
template <typename T>
struct View {
  T* data;
  int64_t *sizes, *strides;

  bool of(AtenTensorHandle tensor) {
    void* address;
    const bool failed = aoti_torch_get_data_ptr(tensor, &address) || aoti_torch_get_sizes(tensor, &sizes) ||
                        aoti_torch_get_strides(tensor, &strides);
    data = static_cast<T*>(address);
    return !failed && (strides[3] == 1 || sizes[3] == 1);
  }
  T* at(int64_t row, int64_t head) const { return data + row * strides[0] + head * strides[1]; }
};

template <typename T>
AOTITorchError attention(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle mask,
                         float scale, float softcap, int32_t dtype, AtenTensorHandle* result) {
  View<T> q, k, v, y;
  View<bool> m;
  if (!q.of(query) || !k.of(keys) || !v.of(values) || !m.of(mask)) return AOTI_TORCH_FAILURE;
  const int64_t rows = q.sizes[0], heads = q.sizes[1], out = v.sizes[3], repeats = heads / k.sizes[1];
  const int64_t shape[] = {rows, 1, heads, out}, strides[] = {heads * out, heads * out, out, 1};
  if (aoti_torch_empty_strided(4, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, result) || !y.of(*result))
    return AOTI_TORCH_FAILURE;
  const Attention a{k.sizes[2], k.sizes[3], out, k.strides[2], v.strides[2], scale, softcap};
  const auto attend_head = a.width % kBlock == 0 && out % (4 * kBlock) == 0 ? attend<true, T> : attend<false, T>;
#pragma omp parallel for collapse(2) schedule(static) if (rows * heads * a.columns * a.width > kParallel)
  for (int64_t b = 0; b < rows; b++)
    for (int64_t h = 0; h < heads; h++)
      attend_head(a, q.at(b, h), k.at(b, h / repeats), v.at(b, h / repeats), m.at(b, m.sizes[1] == 1 ? 0 : h),
                  y.data + (b * heads + h) * out);
  return AOTI_TORCH_SUCCESS;
}

thread_local const Linear* const* layers = nullptr;

}  // namespace

extern "C" {

// x [count, in], y [count, out], both in bfloat16 or float32.
bool sigmix_linear(const Linear* layer, bool half, const void* x, int64_t count, void* y, int threads) {
  return run(*layer, half, x, count, y, threads);
}

// Logits bfloat16 [rows, count] -> the most probable token int64 [rows] and its log-probability float32 [rows].
void sigmix_greedy(const void* logits, int64_t rows, int64_t count, int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
  for (int64_t r = 0; r < rows; r++)
    greedy_row(static_cast<const BFloat16*>(logits) + r * count, count, tokens + r, logprobs + r);
}

// Set the layers that the next call of a compiled step computes, by number; null where Python computes them.
void sigmix_set_layers(const Linear* const* present) { layers = present; }

// The operator sigmix::linear of a compiled step, see sigmix/engine/cpu/decode_step.py.
AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, int64_t number, int64_t out, AtenTensorHandle* result) {
  const Linear* layer = layers == nullptr ? nullptr : layers[number];
  int32_t dtype;
  bool contiguous;
  if (aoti_torch_get_dtype(x, &dtype) || aoti_torch_is_contiguous(x, &contiguous)) return AOTI_TORCH_FAILURE;
  const bool half = dtype == aoti_torch_dtype_bfloat16();
  if (layer != nullptr && contiguous && (half || dtype == aoti_torch_dtype_float32())) {
    int64_t dim, numbers, *sizes;
    void *from, *to;
    if (aoti_torch_get_dim(x, &dim) || aoti_torch_get_numel(x, &numbers) || aoti_torch_get_sizes(x, &sizes) ||
        aoti_torch_get_data_ptr(x, &from))
      return AOTI_TORCH_FAILURE;
    std::vector<int64_t> shape(sizes, sizes + dim), strides(dim, 1);
    shape[dim - 1] = out;
    for (int64_t d = dim - 1; d > 0; d--) strides[d - 1] = strides[d] * shape[d];
    const int32_t cpu = aoti_torch_device_type_cpu();
    if (aoti_torch_empty_strided(dim, shape.data(), strides.data(), dtype, cpu, 0, result) ||
        aoti_torch_get_data_ptr(*result, &to))
      return AOTI_TORCH_FAILURE;
    if (run(*layer, half, from, numbers / layer->in, to, omp_get_max_threads())) return AOTI_TORCH_SUCCESS;
    aoti_torch_delete_tensor_object(*result);
  }
  AtenTensorHandle own;  // the dispatcher takes it
  if (aoti_torch_new_tensor_handle(x, &own)) return AOTI_TORCH_FAILURE;
  StableIValue stack[] = {reinterpret_cast<StableIValue>(own), static_cast<StableIValue>(number),
                          static_cast<StableIValue>(out)};
  if (aoti_torch_call_dispatcher("sigmix::linear", "", stack)) return AOTI_TORCH_FAILURE;
  *result = reinterpret_cast<AtenTensorHandle>(stack[0]);
  return AOTI_TORCH_SUCCESS;
}

// The operator sigmix::attention of a compiled step, see sigmix/engine/cpu/decode_export.py.
AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                        AtenTensorHandle mask, double scale, double softcap, AtenTensorHandle* result) {
  int32_t dtype;
  if (aoti_torch_get_dtype(query, &dtype)) return AOTI_TORCH_FAILURE;
  if (dtype == aoti_torch_dtype_bfloat16())
    return attention<BFloat16>(query, keys, values, mask, scale, softcap, dtype, result);
  if (dtype == aoti_torch_dtype_float32())
    return attention<float>(query, keys, values, mask, scale, softcap, dtype, result);
  return AOTI_TORCH_FAILURE;
}

}  // extern "C"
