#include "mechanisms.hpp"

namespace bench {

void add_linear(Suite& suite, bool causal) {
  add_attention(suite, nearfar::Linear<float>(standard_heads, {.causal = causal}),
                {.mechanism = "linear", .causal = causal, .reach = long_reach, .flops = [=](Index n) {
                   return flops_of_linear(standard_heads, n, 1, causal);
                 }});
}

void add_nystrom(Suite& suite) {
  constexpr Index landmarks = 64;
  add_attention(suite, nearfar::Nystrom<float>(standard_heads, {.landmarks = landmarks}),
                {.mechanism = "nystrom", .reach = {65536, 65536}, .flops = [=](Index n) {
                   return flops_of_nystrom(standard_heads, n, landmarks);
                 }});
}

void add_fmm(Suite& suite, bool causal) {
  const nearfar::FmmOptions options{.window = {29, 29},
                                    .feature_maps = {nearfar::feature_map::Elu{}, nearfar::feature_map::EluFlip{}},
                                    .causal = causal};
  const nearfar::Window window = causal ? options.window.causal() : options.window;
  add_attention(suite, nearfar::Fmm<float>(standard_heads, options),
                {.mechanism = "fmm", .causal = causal, .reach = long_reach, .flops = [=](Index n) {
                   return flops_of_window(standard_heads, window, n) + flops_of_linear(standard_heads, n, 2, causal);
                 }});
}

}  // namespace bench
