"""The GPU back end: NVIDIA DALI decodes, resizes and crops on the device. The same graph runs on a CPU, for tests.

Knows DALI's graph; what to resize to and how to normalise it is told by images.py. One undecodable picture costs DALI
the whole batch, and it cannot say which one: BatchDecodeError. What DALI would not read as published goes to the CPU
back end, counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from meter_fast.data.image_check import BadImage, ImageHeader, read_header
from meter_fast.data.images import BatchDecodeError, ImageTransform, normalise
from meter_fast.data.images_torchvision import TorchvisionBackend, decode_picture, is_extreme
from meter_fast.data.randaugment import DRAWN, Operation
from meter_fast.data.randaugment_dali import SMALLEST, apply_operation, operation_arrays, operation_inputs


class DaliBackend:
    """Decode on `device` (a CUDA device with DALI's `mixed` decoder, a CPU with its own). Follows ImageBackend."""

    name = "dali"

    def __init__(
        self,
        transform: ImageTransform,
        device: torch.device | str,
        dtype: torch.dtype,
        threads: int = 1,
        max_batch: int = 64,
    ) -> None:
        self.transform = transform
        self.device = torch.device(device)
        self.dtype = dtype
        self.threads = threads
        self.max_batch = max_batch
        self.host_decoded: Counter[str] = Counter()
        self._on_gpu = self.device.type == "cuda"
        if self._on_gpu and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._host = TorchvisionBackend(transform, self.device, dtype)
        self._lock = threading.Lock()
        self._pipelines: dict[int, Pipeline] | None = {0: self._build(0)}  # by operations before resizing

    def _build(self, operations: int) -> Pipeline:
        """The graph: bytes and region of interest in, uint8 [n,S,S,3] out. Normalising is left to images.normalise.

        operations: so many of RandAugment's are in between.
        """
        side = self.transform.size
        decoder = "mixed" if self._on_gpu else "cpu"

        @pipeline_def(enable_conditionals=operations > 0)
        def graph():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
            pictures = fn.decoders.image(
                encoded,
                device=decoder,
                output_type=types.RGB,
                adjust_orientation=False,  # as published: EXIF orientation is not applied
                jpeg_fancy_upsampling=True,  # else the GPU's chroma differs from the CPU's
            )
            for number in range(operations):
                pictures = apply_operation(pictures, operation_inputs(number))
            return fn.resize(
                pictures,
                size=[side, side],
                roi_start=start,
                roi_end=end,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )

        pipeline = graph(
            batch_size=self.max_batch,
            num_threads=self.threads,
            device_id=self.device.index if self._on_gpu else None,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline

    def decode(
        self, encoded: Sequence[np.ndarray], operations: Sequence[Sequence[Operation]] | None = None
    ) -> torch.Tensor:
        """B encoded pictures (uint8 arrays), B <= max_batch -> [B,3,S,S] in dtype on device.

        Raises BatchDecodeError when one cannot be decoded, ValueError when there are more than max_batch.
        """
        if len(encoded) > self.max_batch:
            raise ValueError(f"{len(encoded)} pictures in one batch; the DALI back end was opened for {self.max_batch}")
        try:
            headers = [read_header(picture) for picture in encoded]
            kinds = {index: _left_to_host(header, operations is not None) for index, header in enumerate(headers)}
            by_host = [index for index, kind in kinds.items() if kind]
            host = {
                index: decode_picture(encoded[index], self.transform, operations[index] if operations else ())
                for index in by_host
            }
        except BadImage as error:
            raise BatchDecodeError(str(error)) from error
        with self._lock, torch.cuda.device(self.device) if self._on_gpu else nullcontext():
            self.host_decoded.update(kinds[index] for index in by_host)
            images = normalise(self._pictures(encoded, headers, operations, host), self.transform, self.dtype)
            if self._on_gpu:  # DALI reuses its buffer once it is released here, on a stream that knows nothing of ours
                torch.cuda.current_stream().synchronize()
        return images

    def _pictures(
        self,
        encoded: Sequence[np.ndarray],
        headers: list[ImageHeader],
        operations: Sequence[Sequence[Operation]] | None,
        host: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """uint8 [B,3,S,S] on device: those of `host`, decoded before, and all others by DALI."""
        by_dali = [index for index in range(len(encoded)) if index not in host]
        if len(by_dali) == len(encoded) > 0:
            return self._run(encoded, headers, operations)
        side = self.transform.size
        pictures = torch.empty((len(encoded), 3, side, side), dtype=torch.uint8, device=self.device)
        if by_dali:
            own = [operations[index] for index in by_dali] if operations else None
            pictures[by_dali] = self._run([encoded[i] for i in by_dali], [headers[i] for i in by_dali], own)
        for index, picture in host.items():
            pictures[index] = picture.to(self.device)
        return pictures

    def _run(
        self,
        encoded: Sequence[np.ndarray],
        headers: list[ImageHeader],
        operations: Sequence[Sequence[Operation]] | None,
    ) -> torch.Tensor:
        """uint8 [n,3,S,S] on device, in DALI's memory: to be copied before the next run."""
        if self._pipelines is None:
            raise ValueError("the DALI back end is closed")
        drawn = DRAWN if operations else 0
        if drawn not in self._pipelines:
            self._pipelines[drawn] = self._build(drawn)
        pipeline = self._pipelines[drawn]
        regions = np.array([self._region(header) for header in headers], dtype=np.float32)
        for number in range(drawn):
            sizes = [(header.width, header.height) for header in headers]
            for name, values in operation_arrays(number, [own[number] for own in operations], sizes).items():
                pipeline.feed_input(name, values)
        pipeline.feed_input("encoded", [np.asarray(picture, dtype=np.uint8) for picture in encoded])
        pipeline.feed_input("start", np.ascontiguousarray(regions[:, 0]))
        pipeline.feed_input("end", np.ascontiguousarray(regions[:, 1]))
        try:
            (out,) = pipeline.run()
        except RuntimeError as error:
            pipeline = None  # DALI calls a pipeline invalid after an error; free it before its successor is built
            del self._pipelines[drawn]
            self._pipelines[drawn] = self._build(drawn)
            if "decoders.image" not in str(error) or "memory" in str(error):  # then the pictures are not at fault
                raise
            raise BatchDecodeError(" ".join(str(error).split())[:500]) from error
        return torch.from_dlpack(out.as_tensor()).permute(0, 3, 1, 2)

    def _region(self, header: ImageHeader) -> tuple[tuple[float, float], tuple[float, float]]:
        """What the crop keeps, in pixels of the encoded picture: (top, left), (bottom, right)."""
        window, size = self.transform.window(header.width, header.height), self.transform.size
        across, down = header.width / window.width, header.height / window.height
        return (window.top * down, window.left * across), ((window.top + size) * down, (window.left + size) * across)

    def decode_one(self, encoded: np.ndarray, operations: Sequence[Operation] = ()) -> torch.Tensor:
        """One encoded picture -> [3,S,S] in dtype on device, by the CPU back end. Raises BadImage with its cause."""
        return self._host.decode_one(encoded, operations)

    def close(self) -> None:
        """Free the pipeline and its device memory."""
        with self._lock:
            self._pipelines = None
        self._host.close()


def _left_to_host(header: ImageHeader, augmented: bool) -> str:
    """What kind of picture is left to the CPU back end, empty if it is not."""
    if not header.plain:
        return header.kind
    if is_extreme(header):
        return f"{header.kind} of extreme shape"
    if augmented and min(header.width, header.height) < SMALLEST:
        return f"{header.kind} below {SMALLEST} pixels"
    return ""
