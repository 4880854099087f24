// All of SDR's losses and gradients in one launch. Every block but the last computes all similarities of the features
// anew, cheaper than to wait for others, and then the gradient of its own COLUMNS columns; the last one has the logits.

#include "products.cuh"
#include "reduce.cuh"
#include "registry.h"
#include "tile.cuh"

namespace {

constexpr int COLUMNS = 32;  // of the gradient, a lane each
constexpr float LOWEST = -3.402823466e+38f;
constexpr float ZERO_NORM = 1e-12f;  // a shorter row is similar to none and gets no gradient

template <typename T, int ROWS>
struct alignas(16) Shared {
  union {
    Stage<T, ROWS> stages[STAGES];  // until all products are known
    float products[ROWS][ROWS + 4];  // x_i . x_j, and then the weight of x_j in the gradient of x_i
  };
  float columns[ROWS][COLUMNS];
  int64_t label[ROWS];
  float norm[ROWS];     // infinite for a row without direction, so that what it divides is 0
  float largest[ROWS];  // cosine with another row
  float push[ROWS];     // by exp((cosine - largest) / temperature) in the row's loss, 0 where the row has no loss
  float pull[ROWS];     // by each positive
  float loss[ROWS];
  float along[ROWS];  // sum over j of weight_ij (1 - x_i . x_j / x_i . x_i)
};

template <typename T, int ROWS>
__device__ float cosine(const Shared<T, ROWS>& shared, int i, int j) {
  return shared.products[i][j] / (shared.norm[i] * shared.norm[j]);
}

// A warp each: largest, push, pull and loss of every row. Differences come before the division by the temperature,
// which would make rounding errors of cosines larger than what they differ by.
template <typename T, int ROWS>
__device__ void reduce_rows(int N, float temperature, bool real_anchors, Shared<T, ROWS>& shared) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < N; i += WARPS) {
    float cosines[ROWS / 32];
    float largest = LOWEST, positives = 0;
#pragma unroll
    for (int n = 0; n < ROWS / 32; ++n) {
      const int j = 32 * n + lane;
      if (j < N && j != i) {
        cosines[n] = cosine(shared, i, j);
        largest = fmaxf(largest, cosines[n]);
        positives += shared.label[i] == shared.label[j];
      }
    }
    largest = warp_max(largest);
    positives = warp_sum(positives);
    float total = 0, nearness = 0;
#pragma unroll
    for (int n = 0; n < ROWS / 32; ++n) {
      const int j = 32 * n + lane;
      if (j < N && j != i) {
        const float logit = (cosines[n] - largest) / temperature;
        total += expf(logit);
        if (shared.label[i] == shared.label[j]) nearness += logit;
      }
    }
    total = warp_sum(total);
    nearness = warp_sum(nearness);
    if (lane == 0) {
      const bool anchor = positives > 0 && (!real_anchors || shared.label[i] == 0);
      shared.largest[i] = largest;
      shared.push[i] = anchor ? 1 / total : 0;
      shared.pull[i] = anchor ? 1 / positives : 0;
      shared.loss[i] = anchor ? logf(total) - nearness / positives : 0;
    }
  }
}

// products become weights, 0 from N on, and along is set; `scale` is 1 / (anchors * temperature).
template <typename T, int ROWS>
__device__ void weigh_rows(int N, float temperature, float scale, Shared<T, ROWS>& shared) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < N; i += WARPS) {
    const float square = shared.products[i][i];
    __syncwarp();  // all lanes have it, which one of them overwrites
    float along = 0;
#pragma unroll
    for (int n = 0; n < ROWS / 32; ++n) {
      const int j = 32 * n + lane;
      float weight = 0;
      if (j < N && j != i) {
        const float similarity = cosine(shared, i, j);
        const bool same = shared.label[i] == shared.label[j];
        weight = expf((similarity - shared.largest[i]) / temperature) * shared.push[i] - (same ? shared.pull[i] : 0);
        weight += expf((similarity - shared.largest[j]) / temperature) * shared.push[j] - (same ? shared.pull[j] : 0);
        weight *= scale / shared.norm[j];
        along += weight * (square - shared.products[i][j]);
      }
      shared.products[i][j] = weight;
    }
    along = warp_sum(along);
    if (lane == 0) shared.along[i] = along / (shared.norm[i] * shared.norm[i]);
  }
}

// InfoNCE of all rows, and the gradient of COLUMNS columns of the features from column0.
template <typename T, int ROWS>
__device__ void contrastive(
    const T* features, const int64_t* labels, float* loss, float* dfeatures, int64_t column0,
    int N, int64_t V, int64_t D, float temperature, bool real_anchors, Shared<T, ROWS>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  multiply(features, N, D, shared.stages, shared.products);
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += THREADS) {
    const float norm = sqrtf(shared.products[i][i]);
    shared.norm[i] = norm < ZERO_NORM ? __int_as_float(0x7f800000) : norm;  // NVRTC has no INFINITY
    shared.label[i] = labels[i / V];
  }
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
    const int row = i / COLUMNS;
    const int64_t column = column0 + i % COLUMNS;
    shared.columns[row][i % COLUMNS] = row < N && column < D ? to_float(features[row * D + column]) : 0;
  }
  __syncthreads();
  reduce_rows(N, temperature, real_anchors, shared);
  __syncthreads();
  float anchors = 0, sum = 0;  // in every warp alike
  for (int i = lane; i < N; i += 32) {
    anchors += !real_anchors || shared.label[i] == 0;
    sum += shared.loss[i];
  }
  anchors = fmaxf(warp_sum(anchors), 1);
  sum = warp_sum(sum);
  if (column0 == 0 && threadIdx.x == 0) *loss = sum / anchors;
  weigh_rows(N, temperature, 1 / (anchors * temperature), shared);
  __syncthreads();

  // the part of sum_j weight_ij x_j across x_i, as sum_j weight_ij (x_j - x_i) + along_i x_i: of equal rows both are 0
  constexpr int EACH = ROWS / WARPS;
  const int row0 = EACH * warp;
  float own[EACH], dx[EACH];
#pragma unroll
  for (int m = 0; m < EACH; ++m) {
    own[m] = shared.columns[row0 + m][lane];
    dx[m] = row0 + m < N ? shared.along[row0 + m] * own[m] : 0;
  }
  for (int j = 0; j < N; j += 4) {
    float x[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = shared.columns[j + n][lane];
#pragma unroll
    for (int m = 0; m < EACH; ++m) {
      const float4 weight = *reinterpret_cast<const float4*>(&shared.products[row0 + m][j]);
      dx[m] += weight.x * (x[0] - own[m]);
      dx[m] += weight.y * (x[1] - own[m]);
      dx[m] += weight.z * (x[2] - own[m]);
      dx[m] += weight.w * (x[3] - own[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < EACH; ++m) {
    const int i = row0 + m;
    if (i < N && column0 + lane < D) dfeatures[i * D + column0 + lane] = dx[m] / shared.norm[i];
  }
}

// log softmax(logits / temperature) of K classes.
struct LogSoftmax {
  const float* logits;
  float temperature, largest, log_sum = 0;

  __device__ LogSoftmax(const float* logits, int64_t K, float temperature = 1)
      : logits(logits), temperature(temperature), largest(logits[0]) {
    for (int64_t k = 1; k < K; ++k) largest = fmaxf(largest, logits[k]);
    float sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += expf((*this)(k));
    log_sum = logf(sum);
  }
  __device__ float operator()(int64_t k) const { return (logits[k] - largest) / temperature - log_sum; }
};

__device__ float divergence(const LogSoftmax& log_p, const LogSoftmax& log_q, int64_t K) {
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += expf(log_p(k)) * (log_p(k) - log_q(k));
  return sum;
}

// One clip's share of the mutual information, 0 where no view was left out; joint, djoint: [K]; loo, dloo: [W, K].
__device__ float mutual_information(
    const float* joint, const float* loo, float* djoint, float* dloo, int64_t B, int64_t W, int64_t K,
    float temperature, bool detach_joint, bool reverse, bool complementary) {
  const LogSoftmax log_joint(joint, K, temperature);
  float total = 0;
  for (int64_t w = 0; w < W; ++w) {
    const LogSoftmax log_loo(loo + w * K, K, temperature);
    total += reverse ? divergence(log_loo, log_joint, K) : divergence(log_joint, log_loo, K);
  }
  if (total < 0) total = 0;  // by rounding
  const float value = complementary ? expf(-total) : total;
  const float scale = (complementary ? -value : 1) / (B * temperature);
  for (int64_t k = 0; k < K; ++k) djoint[k] = 0;
  for (int64_t w = 0; w < W; ++w) {
    const LogSoftmax log_loo(loo + w * K, K, temperature);
    const float own = reverse ? divergence(log_loo, log_joint, K) : divergence(log_joint, log_loo, K);
    for (int64_t k = 0; k < K; ++k) {
      const float log_p = reverse ? log_loo(k) : log_joint(k), log_q = reverse ? log_joint(k) : log_loo(k);
      const float dp = scale * expf(log_p) * (log_p - log_q - own);
      const float dq = scale * (expf(log_q) - expf(log_p));
      dloo[w * K + k] = reverse ? dp : dq;
      if (!detach_joint) djoint[k] += reverse ? dq : dp;
    }
  }
  return W > 0 ? value / B : 0;
}

// Cross-entropy of one head times scale; its gradient is stored.
__device__ float cross_entropy(const float* logits, int64_t label, float* dlogits, int64_t K, float scale) {
  const LogSoftmax log_p(logits, K);
  float loss = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (k == label) loss = -log_p(k);
    dlogits[k] = scale * (expf(log_p(k)) - (k == label));
  }
  return scale * loss;
}

// z is the logit of label 1; its gradient is stored.
__device__ float binary_cross_entropy(float z, float label, float* dlogit, float scale) {
  const float sigmoid = 1 / (1 + expf(-z));
  *dlogit = scale * (sigmoid - label);
  const float negative = z > 0 ? 0 : -z;  // keeps NaN
  return scale * ((1 - label) * z + negative + log1pf(expf(-fabsf(z))));
}

}  // namespace

// features: [B * V, D]; labels: [B]; logits: [B]; joint: [B, K]; loo: [B, W, K]; parts: [4], ce, mi, contrastive, aux;
// dfeatures: [B * V, D]; dlogits: [B]; djoint: [2, B, K] and dloo: [2, B, W, K], of mi and of aux. B * V <= ROWS.
template <typename T, int ROWS>
__device__ void sdr_loss(
    const T* features, const int64_t* labels, const float* logits, const float* joint, const float* loo,
    float* parts, float* dfeatures, float* dlogits, float* djoint, float* dloo,
    int64_t B, int64_t V, int64_t D, int64_t W, int64_t K, float temperature, float mi_temperature,
    int64_t real_anchors, int64_t detach_joint, int64_t reverse, int64_t complementary) {
  if (blockIdx.x < gridDim.x - 1) {
    contrastive<T, ROWS>(
        features, labels, parts + 2, dfeatures, int64_t{COLUMNS} * blockIdx.x, static_cast<int>(B * V), V, D,
        temperature, real_anchors, *reinterpret_cast<Shared<T, ROWS>*>(shared_memory));
    return;
  }
  float ce = 0, mi = 0, aux = 0;
  const float each_clip = 1.0f / B, each_head = 1.0f / (B * (1 + W));
  for (int64_t b = threadIdx.x; b < B; b += THREADS) {
    const int64_t label = labels[b], own_joint = b * K, own_loo = b * W * K;
    ce += binary_cross_entropy(logits[b], label, dlogits + b, each_clip);
    mi += mutual_information(
        joint + own_joint, loo + own_loo, djoint + own_joint, dloo + own_loo, B, W, K, mi_temperature,
        detach_joint, reverse, complementary);
    aux += cross_entropy(joint + own_joint, label, djoint + B * K + own_joint, K, each_head);
    for (int64_t w = 0; w < W; ++w) {
      const int64_t head = own_loo + w * K;
      aux += cross_entropy(loo + head, label, dloo + B * W * K + head, K, each_head);
    }
  }
  auto& scratch = *reinterpret_cast<float(*)[WARPS]>(shared_memory);
  ce = block_sum(ce, scratch);
  mi = block_sum(mi, scratch);
  aux = block_sum(aux, scratch);
  if (threadIdx.x == 0) {
    parts[0] = ce;
    parts[1] = mi;
    parts[3] = aux;
  }
}

#define SDR_LOSS(name, T, ROWS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(                                                       \
      const T* features, const int64_t* labels, const float* logits, const float* joint, const float* loo,             \
      float* parts, float* dfeatures, float* dlogits, float* djoint, float* dloo, int64_t B, int64_t V, int64_t D,     \
      int64_t W, int64_t K, float temperature, float mi_temperature, int64_t real_anchors, int64_t detach_joint,       \
      int64_t reverse, int64_t complementary) {                                                                        \
    sdr_loss<T, ROWS>(                                                                                                 \
        features, labels, logits, joint, loo, parts, dfeatures, dlogits, djoint, dloo, B, V, D, W, K, temperature,     \
        mi_temperature, real_anchors, detach_joint, reverse, complementary);                                           \
  }                                                                                                                    \
  SDR_KERNEL(name);

SDR_LOSS(sdr_loss_float32_rows64, float, 64)
SDR_LOSS(sdr_loss_float32_rows128, float, 128)
SDR_LOSS(sdr_loss_float16_rows64, __half, 64)
SDR_LOSS(sdr_loss_float16_rows128, __half, 128)
SDR_LOSS(sdr_loss_bfloat16_rows64, __nv_bfloat16, 64)
SDR_LOSS(sdr_loss_bfloat16_rows128, __nv_bfloat16, 128)
