#include "mechanisms.hpp"

namespace bench {

void add_additive(Suite& suite, bool causal) {
  // The core takes query, key and value as they come, scored by weights over all heads as the authors' code has it or a
  // head by its own as the paper has it; with the transform it is the published layer.
  const auto add_rows = [&](const char* name, const nearfar::AdditiveOptions& options) {
    add_attention(suite, additive_attention(options),
                  {.mechanism = name,
                   .causal = causal,
                   .reach = long_reach,
                   .flops = [=](Index n) { return flops_of_additive(standard_heads, n, options); },
                   // bidirectional, the query is read again once the means are known, and so is the gradient of out
                   .tensors_moved = causal ? 4.0 : 5.0,
                   .tensors_moved_backward = causal ? 7.0 : 8.0,
                   .approximates_softmax = false});
  };
  add_rows("additive", {.causal = causal, .transform = false});
  add_rows("additive_per_head", {.causal = causal, .per_head_weights = true, .transform = false});
  add_rows("additive_transform", {.causal = causal});
}

void add_multipole(Suite& suite, bool causal) {
  for (const bool pooled : {false, true}) {
    if (pooled && causal) continue;
    const nearfar::MultipoleOptions options{.block = 64, .rank = 4, .causal = causal, .pooled_queries = pooled};
    add_attention(suite, nearfar::Multipole<float>(standard_heads, options),
                  {.mechanism = pooled ? "multipole_pooled" : "multipole",
                   .causal = causal,
                   .reach = long_reach,
                   .flops = [=](Index n) {
                     return flops_of_pairs(standard_heads,
                                           multipole_pairs(n, options.block, options.rank, causal, pooled));
                   }});
  }
}

}  // namespace bench
