#include <nearfar/reference.hpp>
#include <nearfar/softmax.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

bool add(const std::string& name, const SoftmaxOptions& options) {
  const SubjectCase known{.name = name,
                          .causal = options.causal,
                          .any_shape = true,
                          .takes_infinite_scores = true,
                          // Scores of 40 carry eight times the rounding.
                          .accuracy = options.scale ? 1e-5 : 2e-6};
  return add_subject<Softmax>(known, options, [](const Softmax<double>& attention, const Inputs<double>& inputs) {
    return reference::softmax(attention.heads(), inputs, attention.options().causal, attention.options().scale);
  });
}

const bool added = add("softmax", {}) && add("softmax_causal", {.causal = true}) && add("softmax_scaled", {.scale = 1});

}  // namespace
}  // namespace nearfar::test
