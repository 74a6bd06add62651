#pragma once

// All of nearfar, in reading order.

// clang-format off
#include <nearfar/version.hpp>    // the version and the inline namespace named by it
#include <nearfar/tokens.hpp>     // views of sequences
#include <nearfar/context.hpp>    // threads and working memory
#include <nearfar/attention.hpp>  // the concepts, and what attention reads
#include <nearfar/mask.hpp>       // which keys a query sees
#include <nearfar/softmax.hpp>    // exact attention
// clang-format on
