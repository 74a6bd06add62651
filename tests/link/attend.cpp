#include "attend.hpp"

#include <nearfar/nearfar.hpp>

#include "../support/text.hpp"

namespace UNIT {

std::string version_namespace() { return TEXT(NEARFAR_VERSION_NAMESPACE); }

std::vector<float> attend(const std::vector<float>& tokens) {
  constexpr int width = head_count * head_dim;
  const nearfar::Heads heads{.query = head_count, .key_value = head_count, .dim = head_dim};
  const nearfar::Tokens<const float> view(tokens.data(), token_count, width, width);
  std::vector<float> all;
  for (const char* line :
       {"softmax", "softmax:causal", "banded:left=20,right=3", "linear:maps=elu+tanh", "linear:causal",
        "nystrom:landmarks=4", "fmm", "additive", "multipole:block=16", "multipole:block=16,causal"}) {
    nearfar::Matrix<float> out(token_count, width);
    nearfar::AnyAttention<float>(heads, line).forward({view, view, view}, out);
    all.insert(all.end(), out.data(), out.data() + out.size());
  }
  return all;
}

}  // namespace UNIT
