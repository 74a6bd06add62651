#include <nearfar/nystrom.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

bool add(const std::string& name, const NystromOptions& options) {
  // A random kernel between landmarks may have a condition of some thousands, by which rounding grows.
  const SubjectCase known{
      .name = name, .padding_is_shortening = false, .tolerance = 1e-9, .float_tolerance = 2e-2, .accuracy = 1e-3};
  return add_subject<Nystrom>(known, options, [](const Nystrom<double>& attention, const Inputs<double>& inputs) {
    const NystromOptions& own = attention.options();
    return reference::nystrom(attention.heads(), inputs, own.landmarks, own.scale, own.iterations);
  });
}

const bool added = add("nystrom", {.landmarks = 4}) && add("nystrom_scaled", {.landmarks = 3, .scale = 1}) &&
                   add("nystrom_iterated", {.landmarks = 5, .iterations = 6});

}  // namespace
}  // namespace nearfar::test
