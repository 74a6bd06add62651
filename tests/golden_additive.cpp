#include <nearfar/additive.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  Additive<T> attention(problem.heads, {.causal = problem.causal});
  attention.parameters().for_each([&](const std::string& name, Matrix<T>& matrix) {
    matrix = golden.array<T>(name, matrix.rows(), matrix.cols());
  });
  expect_golden(golden, attention, problem.sample, [](auto& parameters, auto&& visit) { parameters.for_each(visit); });
}

const bool known = add_golden_runner("additive", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
