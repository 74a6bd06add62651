#include "mechanisms.hpp"

namespace bench {

void add_additive(Suite& suite, bool causal) {
  // The core takes query, key and value as they come; with the transform it is the published layer.
  for (const bool transform : {false, true}) {
    nearfar::Additive<float> attention(standard_heads, {.causal = causal, .transform = transform});
    fill(attention.parameters().w_q, standard_heads.query, standard_heads.query_cols(), 4);
    fill(attention.parameters().w_k, standard_heads.query, standard_heads.query_cols(), 5);
    add_attention(
        suite, std::move(attention),
        {.mechanism = transform ? "additive_transform" : "additive",
         .causal = causal,
         .reach = long_reach,
         .flops = [=](Index n) { return flops_of_additive(standard_heads, n, transform); },
         .tensors_moved = causal ? 4.0 : 5.0,  // bidirectional, the query is read again once the means are known
         .approximates_softmax = false});
  }
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
