#include <nearfar/fmm.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

/// Weights as they multiply, one for each head and feature.
Matrix<double> open_gate(const Fmm<double>& attention, const Matrix<double>& weight) {
  Matrix<double> gate(attention.heads().query, attention.heads().value_width());
  for (Index h = 0; h < gate.rows(); ++h) {
    for (Index c = 0; c < gate.cols(); ++c) {
      const double w = weight(weight.rows() == 1 ? 0 : h, weight.cols() == 1 ? 0 : c);
      gate(h, c) = attention.options().gate == Gate::sigmoid ? 1 / (1 + std::exp(-w)) : w;
    }
  }
  return gate;
}

Matrix<double> naive(const Fmm<double>& attention, const Inputs<double>& inputs) {
  const FmmOptions& options = attention.options();
  reference::FmmTerms<double> terms{.window = options.window,
                                    .scale = options.scale,
                                    .linear = {.feature_maps = {},
                                               .normalize_features = options.normalize_features,
                                               .row_sum = options.normalizer == Normalizer::row_sum,
                                               .eps = options.eps,
                                               .causal = options.causal},
                                    .near_weight = open_gate(attention, attention.parameters().near),
                                    .far_weights = {}};
  for (const AnyFeatureMap& map : options.feature_maps) {
    terms.linear.feature_maps.push_back([map](double x) {
      map.value(&x, 1, 1, 1, &x, 1);
      return x;
    });
  }
  for (const auto& weight : attention.parameters().far) terms.far_weights.push_back(open_gate(attention, weight));
  return reference::fmm(attention.heads(), inputs, terms);
}

bool add(const std::string& name, const FmmOptions& options) {
  const SubjectCase known{.name = name,
                          .causal = options.causal,
                          .any_shape = true,
                          .padding_is_shortening = options.normalizer == Normalizer::row_sum};
  return add_subject<Fmm>(known, options, naive);
}

using namespace feature_map;

const bool added =
    add("fmm", {.window = {4, 4}}) &&
    add("fmm_two_maps_causal",
        {.window = {6, 0}, .feature_maps = {Elu{}, EluFlip{}}, .causal = true, .weights = BlendWeights::per_head}) &&
    add("fmm_normalized_plain_causal", {.feature_maps = {Elu{}, Tanh{}},
                                        .causal = true,
                                        .normalize_features = true,
                                        .gate = Gate::identity,
                                        .weights = BlendWeights::shared}) &&
    add("fmm_sqrt_length",
        {.window = {2, 70}, .feature_maps = {Elu{}}, .normalizer = Normalizer::sqrt_length, .gate = Gate::identity});

}  // namespace
}  // namespace nearfar::test
