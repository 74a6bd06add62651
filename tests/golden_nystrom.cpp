#include <nearfar/nystrom.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  golden.require(!problem.causal, "nystrom cannot be causal.");
  EXPECT_LT(golden.number("kernel_condition"), 100) << "the tolerances suit well-conditioned kernels";
  expect_golden(golden, Nystrom<T>(problem.heads, {.landmarks = golden.integer("landmarks")}), problem.sample);
}

const bool known = add_golden_runner("nystrom", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
