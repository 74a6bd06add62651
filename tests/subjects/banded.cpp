#include <nearfar/banded.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

bool add(const std::string& name, const BandedOptions& options) {
  const SubjectCase known{.name = name, .causal = options.causal, .any_shape = true, .takes_infinite_scores = true};
  return add_subject<Banded>(known, options, [](const Banded<double>& attention, const Inputs<double>& inputs) {
    const BandedOptions& own = attention.options();
    return reference::banded(attention.heads(), inputs, own.window, own.causal, own.scale);
  });
}

const bool added = add("banded", {.window = {3, 5}}) && add("banded_causal", {.window = {9, 2}, .causal = true}) &&
                   add("banded_to_itself", {.window = {0, 0}}) &&
                   add("banded_wider_than_a_panel", {.window = {70, 40}}) &&
                   add("banded_unlimited_causal", {.causal = true});

}  // namespace
}  // namespace nearfar::test
