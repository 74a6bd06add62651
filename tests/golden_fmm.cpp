#include <nearfar/fmm.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  FmmOptions options{.window = {golden.integer("left"), golden.integer("right")},
                     .feature_maps = {},
                     .causal = problem.causal,
                     .normalize_features = golden.flag("normalize_features"),
                     .gate = golden.flag("sigmoid_gates") ? Gate::sigmoid : Gate::identity};
  options.normalizer = golden.choice<Normalizer>(
      "normalizer", {{"row_sum", Normalizer::row_sum}, {"sqrt_length", Normalizer::sqrt_length}});
  if (options.normalizer == Normalizer::row_sum) options.eps = golden.number("eps");
  std::istringstream names(golden.word("feature_maps"));
  for (std::string one; std::getline(names, one, ',');) options.feature_maps.push_back(feature_map_from_name(one));
  golden.require(static_cast<Index>(options.feature_maps.size()) == golden.integer("num_feature_maps"),
                 "feature_maps must list num_feature_maps names.");

  Fmm<T> attention(problem.heads, options);
  attention.parameters().for_each([&](const std::string& name, Matrix<T>& matrix) {
    matrix = golden.array<T>(name, matrix.rows(), matrix.cols());
  });
  expect_golden(golden, attention, problem.sample, [](auto& parameters, auto&& visit) { parameters.for_each(visit); });
}

const bool known = add_golden_runner("fmm", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
