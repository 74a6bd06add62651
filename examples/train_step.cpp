// A block of a transformer with any attention, its backward pass and the steps of an optimiser.

#include "train/model.hpp"
#include "train/optimizer.hpp"

#include <nearfar/nearfar.hpp>

#include <iostream>

int main() {
  using Attention = nearfar::Multipole<float>;
  const Attention attention({.query = 2, .key_value = 2, .dim = 32}, {.block = 16, .rank = 2, .causal = true});
  train::Random random({1});
  train::Block<Attention> block(64, attention, 128, 0, random);  // width, attention, feed-forward width, dropout
  train::Adam<float> adam(train::variables_of(block), {.rate = 1e-2, .warm_up = 10, .steps = 200, .clip = 1});

  std::vector<nearfar::Index> offsets = {0};  // 20 sequences, end to end
  while (offsets.back() < 1000) offsets.push_back(offsets.back() + 50);
  for (nearfar::Index step = 0; step < 200; ++step) {
    // The tokens of a sequence are one row, the target, and noise as large: alone none comes below an error of 0.7.
    nearfar::Matrix<float> target(1000, 64);
    for (nearfar::Index b = 0; b < 20; ++b) target.middleRows(50 * b, 50).rowwise() = Eigen::RowVectorXf::Random(64);
    const nearfar::Matrix<float> x = target + nearfar::Matrix<float>::Random(1000, 64);

    const nearfar::Matrix<float> error = block.forward(x, offsets, &random).matrix() - target;
    const nearfar::Matrix<float> grad_y = 2e-3F / 64 * error;  // of the mean squared error
    block.backward(grad_y);
    adam.step(step);
    if (step % 40 == 39) std::cout << "step " << step << ": error " << error.norm() / target.norm() << '\n';
  }
}
