// A block of a transformer with any attention, its backward pass and the steps of an optimiser.

#include "train/model.hpp"
#include "train/optimizer.hpp"

#include <nearfar/nearfar.hpp>

#include <iostream>

int main() {
  using Attention = nearfar::Multipole<float>;
  const Attention attention({.query = 2, .key_value = 2, .dim = 32}, {.block = 16, .rank = 2, .causal = true});
  train::Random random({1});
  train::Block<Attention> block(64, attention, 128, 0.1, random);  // width, attention, feed-forward width, dropout
  train::Adam<float> adam(train::variables_of(block), {.rate = 1e-2, .warm_up = 10, .steps = 200, .clip = 1});

  const nearfar::Matrix<float> x = nearfar::Matrix<float>::Random(1000, 64);
  const nearfar::Matrix<float> target = x.cwiseAbs2();
  const std::vector<nearfar::Index> offsets = {0, 300, 1000};  // two sequences, end to end
  for (nearfar::Index step = 0; step < 200; ++step) {
    const nearfar::Matrix<float> error = block.forward(x, offsets, &random).matrix() - target;
    const nearfar::Matrix<float> grad_y = 2e-3F / 64 * error;  // of the mean squared error
    block.backward(grad_y);
    adam.step(step);
    if (step % 40 == 0) std::cout << "step " << step << ": error " << error.norm() / target.norm() << '\n';
  }
}
