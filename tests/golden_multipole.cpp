#include <nearfar/multipole.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  MultipoleOptions options{
      .block = golden.integer("block"),
      .rank = golden.integer("rank"),
      .causal = problem.causal,
      .mass_scaling = golden.flag("mass_scaling"),
      .pooling = golden.choice<Pooling>("pooling", {{"average", Pooling::average},
                                                    {"grouped_conv", Pooling::grouped_convolution},
                                                    {"hierarchical_conv", Pooling::hierarchical_convolution}}),
      .pooled_queries = golden.flag("downsampled_queries"),
      .levels = golden.integer("levels")};
  if (golden.has("query_pooling")) {
    options.query_pooling = golden.choice<QueryPooling>(
        "query_pooling", {{"unmasked", QueryPooling::unmasked}, {"all", QueryPooling::all}});
  }
  EXPECT_EQ(detail::Hierarchy(problem.tokens, options.block, options.rank).levels(), options.levels);

  Multipole<T> attention(problem.heads, options);
  attention.parameters().for_each([&](const std::string& name, Matrix<T>& matrix) {
    matrix = golden.array<T>(name, matrix.rows(), matrix.cols());
  });
  expect_golden(golden, attention, problem.sample, [](auto& parameters, auto&& visit) { parameters.for_each(visit); });
}

const bool known = add_golden_runner("multipole", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
