#include <nearfar/banded.hpp>

#include "support/golden.hpp"

namespace nearfar::test {
namespace {

template <class T>
void run(GoldenCase& golden) {
  const GoldenProblem<T> problem(golden);
  const Window window{golden.integer("left"), golden.integer("right")};
  expect_golden(golden, Banded<T>(problem.heads, {.window = window, .causal = problem.causal}), problem.sample);
}

const bool known = add_golden_runner("banded", run<double>, run<float>);

}  // namespace
}  // namespace nearfar::test
