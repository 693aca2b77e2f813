// Detect in a picture, without Python: detect FOLDER PICTURE.ppm [REPEAT]
//
// FOLDER is made by make_package.py; docs/serving.md explains. Prints a line for each detection: score, x0, y0, x1, y1
// in pixels of the picture, name. With REPEAT, the network runs that often, and medians of its time go to the error
// stream.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Metadata = std::unordered_map<std::string, std::string>;

struct Size {
  int64_t height, width;  // pixels
};

// Next number in the header of a PPM file; skips comments.
int64_t read_number(std::istream& file) {
  while ((file >> std::ws).peek() == '#') {
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  int64_t number = 0;
  file >> number;
  return number;
}

// (1, 3, H, W) uint8 of a binary PPM file (P6, 8 bits). Any decoder that fills such a tensor will do.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind(2, ' ');
  file.read(kind.data(), 2);
  const int64_t width = read_number(file), height = read_number(file), highest = read_number(file);
  file.get();  // one white space
  const int64_t most = int64_t{1} << 16;
  if (!file || kind != "P6" || highest != 255 || std::min(width, height) < 1 || std::max(width, height) > most) {
    throw std::runtime_error(path + ": no binary PPM file of 8 bits (P6)");
  }
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
  if (file.gcount() != pixels.numel()) {
    throw std::runtime_error(path + ": the file ends early");
  }
  return pixels.permute({2, 0, 1}).unsqueeze(0);
}

// Size after resizing: as large as fits into the network's size. The rule `fit` of docs/export.md.
Size resized_size(Size most, Size size) {
  const double scale = std::min(double(most.height) / size.height, double(most.width) / size.width);
  const auto fit = [&](int64_t side) { return std::max<int64_t>(1, int64_t(side * scale + 0.5)); };
  return {fit(size.height), fit(size.width)};
}

std::vector<std::string> split_lines(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(line);
  }
  return lines;
}

// (1, 3, H, W) uint8 of the size `most`; the picture, resized to `size`, is in the upper left corner.
at::Tensor prepare(const at::Tensor& picture, Size most, Size size) {
  // Antialiased like Pillow's bilinear filter, within one unit of 255.
  const auto resized = at::_upsample_bilinear2d_aa(picture, {size.height, size.width}, /*align_corners=*/false);
  return at::constant_pad_nd(resized, {0, most.width - size.width, 0, most.height - size.height}).contiguous();
}

void print_detections(const std::vector<at::Tensor>& found, const Metadata& about, Size size, Size original) {
  const auto names = split_lines(about.at("names")), thresholds = split_lines(about.at("thresholds"));
  const at::Tensor boxes = found[0][0], scores = found[1][0], labels = found[2][0];  // (K, 4), (K,), (K,)
  const float x = float(original.width) / size.width, y = float(original.height) / size.height;
  for (int64_t i = 0; i < scores.size(0); ++i) {
    const float score = scores[i].item<float>();
    const int64_t label = labels[i].item<int64_t>();
    if (score >= std::stof(thresholds.at(label))) {
      const at::Tensor box = boxes[i];
      const auto at = [&](int j) { return box[j].item<float>() * (j % 2 ? y : x); };
      std::printf("%.4f %.2f %.2f %.2f %.2f %s\n", score, at(0), at(1), at(2), at(3), names.at(label).c_str());
    }
  }
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + values.size() / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// The attention operator: its library registers it with PyTorch.
void load_operator(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW)) {
    throw std::runtime_error(dlerror());
  }
}

void detect(const std::string& folder, const std::string& path, int repeat) {
  const c10::InferenceMode no_gradients;
  load_operator(folder + "/_deform_attn_schema.so");
  load_operator(folder + "/_deform_attn_cpu.so");
  torch::inductor::AOTIModelPackageLoader model(folder + "/network.pt2");
  const Metadata about = model.get_metadata();
  const Size most{std::stoll(about.at("height")), std::stoll(about.at("width"))};
  const at::Tensor picture = read_ppm(path);
  const Size original{picture.size(2), picture.size(3)}, size = resized_size(most, original);
  const at::Tensor images = prepare(picture, most, size);
  const at::Tensor sizes = at::tensor({size.height, size.width}, at::kLong).unsqueeze(0);  // (1, 2)
  std::vector<at::Tensor> found = model.run({images, sizes});  // boxes, scores, labels
  std::vector<double> wall, processor;  // milliseconds of each run
  for (int i = 0; i < repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t ticks = std::clock();
    found = model.run({images, sizes});
    processor.push_back(1000.0 * (std::clock() - ticks) / CLOCKS_PER_SEC);
    wall.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  print_detections(found, about, size, original);
  if (repeat > 0) {
    std::fprintf(stderr, "%.1f ms, %.1f ms of processor time\n", median(wall), median(processor));
  }
}

int main(int count, char** words) {
  if (count < 3 || count > 4) {
    std::fprintf(stderr, "usage: detect FOLDER PICTURE.ppm [REPEAT]\n");
    return 2;
  }
  try {
    detect(words[1], words[2], count > 3 ? std::atoi(words[3]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", split_lines(error.what()).at(0).c_str());
    return 1;
  }
  return 0;
}
