#include "mechanisms.hpp"

#include <torch/torch.h>

#include <limits>
#include <string>

// LibTorch multiplies by a BLAS, and does not tell that one how many threads to take.
extern "C" void openblas_set_num_threads(int) __attribute__((weak));

// What one writes with PyTorch, in its C++ form: batched products over all heads, and the blockwise forms of band,
// linear and additive attention.
namespace bench {
namespace {

using torch::Tensor;
using torch::indexing::None;
using torch::indexing::Slice;

constexpr std::int64_t heads = standard_heads.query;
constexpr std::int64_t dim = standard_heads.dim;

/// heads x n x dim, over the same memory.
Tensor by_head(const float* data, Index n) {
  return torch::from_blob(const_cast<float*>(data), {n, heads, dim}, torch::kFloat32).transpose(0, 1);
}

Tensor softmax_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& hidden) {
  Tensor scores = torch::matmul(query, key.transpose(-1, -2)).mul_(1 / std::sqrt(static_cast<double>(dim)));
  if (hidden.defined()) scores.masked_fill_(hidden, -std::numeric_limits<float>::infinity());
  return torch::matmul(torch::softmax(scores, -1), value);
}

/// Blocks of queries against their own and the neighbouring blocks of keys.
struct BlockedBand {
  std::int64_t block;
  std::int64_t before;  // neighbouring blocks on either side
  std::int64_t after;
  Tensor hidden;

  BlockedBand(nearfar::Window window, std::int64_t n)
      : block(std::min<std::int64_t>(window.left + 1 >= 256 ? 256 : 128, n)),
        before((window.left + block - 1) / block),
        after((window.right + block - 1) / block) {
    const Tensor query = torch::arange(n).view({n / block, block, 1});
    const Tensor first = torch::arange(0, n, block).view({n / block, 1, 1}) - before * block;
    const Tensor key = first + torch::arange((before + 1 + after) * block).view({1, 1, -1});
    hidden = (key < 0) | (key >= n) | (key < query - window.left) | (key > query + window.right);
  }

  Tensor blocks(const Tensor& tokens) const { return tokens.unflatten(1, {tokens.size(1) / block, block}); }

  Tensor neighbours(const Tensor& tokens) const {
    const Tensor padded = torch::constant_pad_nd(tokens, {0, 0, before * block, after * block});
    return padded.unfold(1, (before + 1 + after) * block, block).transpose(-1, -2);
  }

  Tensor operator()(const Tensor& query, const Tensor& key, const Tensor& value) const {
    return softmax_attention(blocks(query), neighbours(key), neighbours(value), hidden).flatten(1, 2);
  }
};

Tensor linear_attention(const Tensor& query, const Tensor& key, const Tensor& value) {
  const Tensor query_features = torch::elu(query).add_(1);
  const Tensor key_features = torch::elu(key).add_(1);
  const Tensor state = torch::matmul(key_features.transpose(-1, -2), value);
  const Tensor weight = torch::matmul(query_features, key_features.sum(1, true).transpose(-1, -2));
  return torch::matmul(query_features, state).div_(weight);
}

/// With weights over all heads, without the transform.
Tensor additive_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_weights,
                          const Tensor& key_weights) {
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  const auto pooled = [&](const Tensor& tokens, const Tensor& weights) {  // 1 x heads x dim
    const Tensor shares = torch::softmax(torch::matmul(tokens.flatten(1), weights).mul_(scale), 0);
    return (tokens * shares.unsqueeze(-1)).sum(0, true);
  };
  const Tensor products = pooled(query, query_weights) * key;
  return pooled(products, key_weights) * value + query;
}

using Attend = std::function<Tensor(const Tensor& query, const Tensor& key, const Tensor& value)>;

template <nearfar::Attention A>
void add_peer(Suite& suite, const char* mechanism, bool causal, Reach reach, std::function<double(Index)> flops,
              std::function<Attend(Index n)> make, A expected) {
  add<float>(suite, {.family = "peer/libtorch",
                     .mechanism = mechanism,
                     .causal = causal,
                     .reach = reach,
                     .flops = std::move(flops),
                     .prepare =
                         [make](const auto& inputs, auto out) {
                           const Index n = inputs.query.rows();
                           return [=, attend = make(n)](nearfar::Context& context) {
                             const torch::NoGradGuard forward_only;
                             at::set_num_threads(context.threads());
                             if (openblas_set_num_threads != nullptr) openblas_set_num_threads(context.threads());
                             by_head(out.data(), n)
                                 .copy_(attend(by_head(inputs.query.data(), n), by_head(inputs.key.data(), n),
                                               by_head(inputs.value.data(), n)));
                           };
                         },
                     .expected = expected_of(std::move(expected)),
                     .approximates_softmax = std::string(mechanism) != "additive"});
}

}  // namespace

void add_libtorch(Suite& suite) {
  for (const bool causal : {false, true}) {
    add_peer(
        suite, "softmax", causal, {.quick = 4096, .full = 8192},
        [=](Index n) { return flops_of_window(standard_heads, full_window(causal), n); },
        [=](Index n) -> Attend {
          const Tensor hidden = causal ? torch::ones({n, n}, torch::kBool).triu(1) : Tensor();
          return [=](const Tensor& query, const Tensor& key, const Tensor& value) {
            return softmax_attention(query, key, value, hidden);
          };
        },
        nearfar::Softmax<float>(standard_heads, {.causal = causal}));
    add_peer(
        suite, "banded", causal, {.quick = 4096, .full = 65536},
        [=](Index n) { return flops_of_window(standard_heads, banded_window(causal), n); },
        [=](Index n) -> Attend { return BlockedBand(banded_window(causal), n); },
        nearfar::Banded<float>(standard_heads, {.window = banded_window(causal), .causal = causal}));
  }
  add_peer(
      suite, "linear", false, {.quick = 4096, .full = 65536},
      [](Index n) { return flops_of_linear(standard_heads, n, 1, false); },
      [](Index) -> Attend { return linear_attention; }, nearfar::Linear<float>(standard_heads));
  const nearfar::AdditiveOptions without_transform{.transform = false};
  const auto additive = bench::additive_attention(without_transform);
  add_peer(
      suite, "additive", false, {.quick = 4096, .full = 65536},
      [=](Index n) { return flops_of_additive(standard_heads, n, without_transform); },
      [=](Index) -> Attend {
        const auto weights = [](const nearfar::Matrix<float>& of_heads) {
          return torch::from_blob(const_cast<float*>(of_heads.data()), {heads, heads * dim}).t().contiguous();
        };
        const Tensor query_weights = weights(additive.parameters().w_q);
        const Tensor key_weights = weights(additive.parameters().w_k);
        return [=](const Tensor& query, const Tensor& key, const Tensor& value) {
          return additive_attention(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), query_weights,
                                    key_weights)
              .transpose(0, 1);
        };
      },
      additive);
}

}  // namespace bench
