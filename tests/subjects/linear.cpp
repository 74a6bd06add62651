#include <nearfar/linear.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

Matrix<double> naive(const Linear<double>& attention, const Inputs<double>& inputs) {
  const LinearOptions& options = attention.options();
  reference::LinearTerms<double> terms;
  for (const AnyFeatureMap& map : options.feature_maps) {
    terms.feature_maps.push_back([map](double x) {
      map.value(&x, 1, 1, 1, &x, 1);
      return x;
    });
  }
  terms.normalize_features = options.normalize_features;
  terms.row_sum = options.normalizer == Normalizer::row_sum;
  terms.eps = options.eps;
  terms.causal = options.causal;
  return reference::linear(attention.heads(), inputs, terms);
}

bool add(const std::string& name, const LinearOptions& options) {
  const SubjectCase known{.name = name,
                          .causal = options.causal,
                          .any_shape = true,
                          .padding_is_shortening = options.normalizer == Normalizer::row_sum};
  return add_subject<Linear>(known, options, naive);
}

using namespace feature_map;

const bool added =
    add("linear", {}) && add("linear_causal", {.causal = true}) &&
    add("linear_three_maps_normalized_causal",
        {.feature_maps = {Elu{}, EluFlip{}, Tanh{}}, .causal = true, .normalize_features = true}) &&
    add("linear_sqrt_length", {.feature_maps = {Identity{}, Relu{}}, .normalizer = Normalizer::sqrt_length}) &&
    add("linear_sqrt_length_causal",
        {.feature_maps = {Sigmoid{}, Softplus{}}, .causal = true, .normalizer = Normalizer::sqrt_length});

}  // namespace
}  // namespace nearfar::test
