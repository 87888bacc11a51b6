// The builds of the kernels by instruction set, counted from 0, the narrowest.
#pragma once

#include <cstdint>
#include <string>

namespace effnet {

struct Kernels;
struct TrainKernels;

std::string instruction_sets();  // their names
int64_t instruction_set();       // the one in use
std::string set_instruction_set(
    int64_t index);  // -1 is the widest that runs here; why it does not, or nothing

// Of the instruction set in use; for training the widest that is not wider.
const Kernels& kernels();
const TrainKernels& train_kernels();

}  // namespace effnet
