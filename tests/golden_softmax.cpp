#include <nearfar/softmax.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  expect_golden(golden, Softmax<T>(problem.heads, {.causal = problem.causal}), problem.sample);
}

const bool known = add_golden_runner("softmax", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
