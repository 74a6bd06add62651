#include "mechanisms.hpp"

namespace bench {

void add_softmax(Suite& suite, bool causal) {
  const auto flops = [causal](const Heads& heads) {
    return [=](Index n) { return flops_of_window(heads, full_window(causal), n); };
  };
  const nearfar::SoftmaxOptions options{.causal = causal};
  add_attention(suite, nearfar::Softmax<float>(standard_heads, options),
                {.mechanism = "softmax", .causal = causal, .reach = softmax_reach, .flops = flops(standard_heads)});

  const Heads wide{.query = 4, .key_value = 4, .dim = 128};
  add_attention(suite, nearfar::Softmax<float>(wide, options),
                {.mechanism = "softmax_d128", .causal = causal, .reach = {4096, 16384}, .flops = flops(wide)});
  add_attention(
      suite, nearfar::Softmax<double>(standard_heads, options),
      {.mechanism = "softmax_double", .causal = causal, .reach = {4096, 8192}, .flops = flops(standard_heads)});
  if (causal) {
    add_attention(suite, nearfar::Softmax<float>(standard_heads, options),
                  {.mechanism = "softmax_decode",
                   .causal = causal,
                   .reach = {65536, 65536},
                   .flops = [](Index n) { return flops_of_pairs(standard_heads, real(n)); },
                   .one_query = true});
  }
}

void add_banded(Suite& suite, bool causal) {
  const auto add_window = [&](const char* mechanism, nearfar::Window window) {
    add_attention(suite, nearfar::Banded<float>(standard_heads, {.window = window, .causal = causal}),
                  {.mechanism = mechanism, .causal = causal, .reach = long_reach, .flops = [=](Index n) {
                     return flops_of_window(standard_heads, causal ? window.causal() : window, n);
                   }});
  };
  add_window("banded", banded_window(causal));
  add_window("banded_30", {29, 29});  // the FMMformer paper's bands, |i - j| < 30 and < 5
  add_window("banded_5", {4, 4});
}

}  // namespace bench
