//! Device names to candle devices. The only place that chooses a backend.

use candle_core::Device;
use lorad_proto::problem::Problem;

/// Opens `cpu`, `cuda:N` or `metal:N`.
///
/// # Errors
/// An unknown name, a backend that this build lacks, or a device that cannot be opened.
pub fn open(name: &str) -> Result<Device, Problem> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index.parse().map_err(|_| unknown(name))?;
    let opened = match kind {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Device::new_cuda(index),
        "metal" => Device::new_metal(index),
        _ => return Err(unknown(name)),
    };
    opened.map_err(|e| {
        Problem::new(
            "device.unavailable",
            "The device cannot be used",
            format!("{name}: {e}"),
        )
        .with_hint("CUDA and Metal need a build with that feature, and their drivers.")
    })
}

fn unknown(name: &str) -> Problem {
    Problem::new(
        "device.unknown",
        "There is no such device",
        format!("{name:?} is not a device name"),
    )
    .with_hint("Names are cpu, cuda:0, cuda:1, …, metal:0.")
}
