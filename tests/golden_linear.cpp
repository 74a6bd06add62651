#include <nearfar/linear.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

// The file has the result of each feature map by itself, and the gradients summed over the maps.
template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  const Sample<T>& sample = problem.sample;
  LinearOptions options{.causal = problem.causal, .normalize_features = golden.flag("normalize_features")};
  options.normalizer = golden.choice<Normalizer>(
      "normalizer", {{"row_sum", Normalizer::row_sum}, {"sqrt_length", Normalizer::sqrt_length}});
  if (options.normalizer == Normalizer::row_sum) options.eps = golden.number("eps");
  std::vector<std::string> names;
  std::istringstream list(golden.word("feature_maps"));
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  golden.require(static_cast<Index>(names.size()) == golden.integer("num_feature_maps"),
                 "feature_maps must list num_feature_maps names.");

  const GoldenTolerance tolerance = golden_tolerance<T>(golden);
  const Index rows = problem.tokens, cols = problem.heads.out_cols();
  Gradients<T, NoParameters> total{{}, 0 * sample.query, 0 * sample.key, 0 * sample.value, {}};
  for (std::size_t r = 0; r < names.size(); ++r) {
    options.feature_maps = {feature_map_from_name(names[r])};
    const Linear<T> attention(problem.heads, options);
    const auto out = golden.array<double>("out_" + std::to_string(r), rows, cols);
    const auto grad_out = golden.array<T>("grad_out_" + std::to_string(r), rows, cols);
    EXPECT_TRUE(close(run_forward(attention, sample), out, tolerance.out)) << names[r];
    const auto gradients = run_backward(attention, sample, grad_out);
    EXPECT_TRUE(close(gradients.out, out, tolerance.out)) << names[r] << " that saves";
    total.query += gradients.query;
    total.key += gradients.key;
    total.value += gradients.value;
  }
  expect_golden_input_gradients<T>(golden, total, tolerance.gradient);
  golden.require_all_used();
}

const bool known = add_golden_runner("linear", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
