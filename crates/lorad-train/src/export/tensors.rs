//! Named f32 tensors in memory, and safetensors files of them.
//!
//! The writer is this project's own because the crate's keeps header metadata in an unordered map: the same adapter
//! would get another file, and another hash, on every run. Files are read back with the crate, so a mistake in the
//! writer shows.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lorad_proto::problem::Problem;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::Result;

/// An f32 tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Host {
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

impl Host {
    /// Copies a tensor from its device.
    pub(super) fn from_tensor(tensor: &Tensor) -> Result<Self> {
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values: tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?,
        })
    }

    pub(super) fn scalar(value: f32) -> Self {
        Self {
            shape: Vec::new(),
            values: vec![value],
        }
    }

    /// As many zeros put behind the values as make dimension `dim` (of two or more) `to` long.
    pub(super) fn padded(&self, dim: usize, to: usize) -> Self {
        let mut shape = self.shape.clone();
        let inner: usize = shape[dim..].iter().product();
        let fill = (to - shape[dim]) * shape[dim + 1..].iter().product::<usize>();
        shape[dim] = to;
        let mut values = Vec::with_capacity(shape.iter().product());
        for row in self.values.chunks_exact(inner.max(1)) {
            values.extend_from_slice(row);
            values.resize(values.len() + fill, 0.0);
        }
        Self { shape, values }
    }

    /// Every value times `factor`.
    pub(super) fn scaled(&self, factor: f64) -> Self {
        Self {
            shape: self.shape.clone(),
            values: self.values.iter().map(|&v| (f64::from(v) * factor) as f32).collect(),
        }
    }
}

/// Tensors by key, and the header's own entries.
#[derive(Debug, Clone, Default)]
pub(super) struct TensorFile {
    pub(super) tensors: BTreeMap<String, Host>,
    pub(super) metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// All values in key order, little endian: the data section of the file.
    pub(super) fn data(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(4 * self.tensors.values().map(|t| t.values.len()).sum::<usize>());
        for value in self.tensors.values().flat_map(|t| &t.values) {
            data.extend_from_slice(&value.to_le_bytes());
        }
        data
    }

    /// The whole file: 8 bytes of header length, the header padded to 8 bytes, the data.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut header = Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".to_owned(), json!(self.metadata));
        }
        let mut end = 0;
        for (key, tensor) in &self.tensors {
            let begin = end;
            end += 4 * tensor.values.len();
            header.insert(
                key.clone(),
                json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}),
            );
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&self.data());
        bytes
    }

    /// Reads a file that this module wrote.
    ///
    /// # Errors
    /// `export.unreadable`: then the export must not be called done.
    pub(super) fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self> {
        let unreadable = |what: String| {
            Problem::new(
                "export.unreadable",
                "A result file does not read back",
                format!("{name}: {what}"),
            )
            .with_hint("This is a bug in lorad, or the disk returns other bytes than were written.")
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| unreadable(e.to_string()))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| unreadable(e.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (key, view) in file.tensors() {
            if view.dtype() != Dtype::F32 {
                return Err(unreadable(format!("{key} is of type {:?}", view.dtype())).into());
            }
            let values = view
                .data()
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
                .collect();
            tensors.insert(
                key,
                Host {
                    shape: view.shape().to_vec(),
                    values,
                },
            );
        }
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { tensors, metadata })
    }
}
