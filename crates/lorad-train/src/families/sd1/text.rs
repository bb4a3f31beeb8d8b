//! Where a job's text embeddings come from.
//!
//! A frozen text encoder reads each caption and prompt once, before training, or not at all where another job left the
//! embedding on disk; it is dropped then, unless captions are shuffled, because every sample has a text of its own there.
//! One that is trained reads every text each time it is asked for, and nothing of it is kept.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};
use lorad_proto::{
    event::{Level, WorkerEvent},
    problem::Problem,
};

use super::{
    cache::arithmetic, clip::ClipTextModel, keys::Part, schema::Settings, tokenizer::ClipTokenizer, weights::BaseFolder,
};
use crate::{
    Result,
    data::{Key, TensorCache},
    lora::AdapterSet,
    nn::AdapterControls,
    task::Reporter,
};

/// Texts that go through the text encoder at a time, before training.
pub(super) const TEXT_BATCH: usize = 16;

/// The embeddings of a job's texts.
#[derive(Debug)]
pub(super) struct Texts {
    /// By text, each (l, d); empty if the encoder is trained.
    known: BTreeMap<String, Tensor>,
    /// Kept if texts will be asked for that are not known.
    encoder: Option<TextEncoder>,
    trained: bool,
}

impl Texts {
    /// Loads the encoder and prepares `texts`, which are all that will be asked for but for shuffled captions.
    ///
    /// # Errors
    /// If the text encoder cannot be loaded or fails, or a command asks to stop.
    pub(super) fn prepare(
        base: &BaseFolder,
        device: &Device,
        settings: &Settings,
        adapters: &AdapterSet,
        texts: &BTreeSet<String>,
        cache: &mut TensorCache,
        reporter: &dyn Reporter,
    ) -> Result<Self> {
        let encoder = TextEncoder::load(base, device, adapters)?;
        encoder.warn_of_long(texts, reporter)?;
        let trained = settings.adapters.train_text_encoder;
        let known = if trained {
            BTreeMap::new()
        } else {
            encoder.embed(texts, cache, reporter)?
        };
        Ok(Self {
            known,
            encoder: (trained || settings.data.caption.shuffle_caption).then_some(encoder),
            trained,
        })
    }

    /// The embeddings of a micro-batch's captions; tracked if the encoder is trained.
    ///
    /// # Shapes
    /// -> (n, l, d).
    ///
    /// # Errors
    /// If a text was not prepared and there is no encoder, or the encoder fails.
    pub(super) fn embed(&self, texts: &[String]) -> Result<Tensor> {
        match &self.encoder {
            Some(encoder) if self.trained => encoder.forward(texts),
            encoder => {
                let each = texts.iter().map(|text| match (self.known.get(text), encoder) {
                    (Some(embedding), _) => Ok(embedding.clone()),
                    // One text at a time, so that its numbers do not depend on what else is in the micro-batch.
                    (None, Some(encoder)) => Ok(encoder.forward(std::slice::from_ref(text))?.squeeze(0)?),
                    (None, None) => Err(Problem::new(
                        "prompt.unknown",
                        "A prompt was not prepared",
                        format!("{text:?} is not among the job's prompts."),
                    )
                    .into()),
                });
                Ok(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?)
            }
        }
    }

    /// What can be turned on and off in the encoder, if there is one.
    pub(super) fn controls(&self) -> Option<&AdapterControls> {
        self.encoder.as_ref().map(|encoder| encoder.model.controls())
    }
}

/// Tokenizer and model.
#[derive(Debug)]
struct TextEncoder {
    tokenizer: ClipTokenizer,
    model: ClipTextModel,
    /// All that the frozen encoder's answers depend on besides the ids.
    key: Key,
    device: Device,
}

impl TextEncoder {
    fn load(base: &BaseFolder, device: &Device, adapters: &AdapterSet) -> Result<Self> {
        Ok(Self {
            tokenizer: base.tokenizer()?,
            model: ClipTextModel::load(base, device, adapters)?,
            key: Key::new("text")
                .with(base.weights(Part::TextEncoder)?.content_hash()?)
                .with(format!("{:?}", base.text_encoder))
                .with(arithmetic(device)),
            device: device.clone(),
        })
    }

    /// (n, l, d).
    fn forward(&self, texts: &[String]) -> Result<Tensor> {
        let ids = texts
            .iter()
            .map(|text| Ok(self.tokenizer.encode(text)?.ids))
            .collect::<Result<Vec<_>>>()?;
        self.forward_ids(&ids)
    }

    fn forward_ids(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let ids = Tensor::from_vec(flat, (ids.len(), self.tokenizer.max_length()), &self.device)?;
        Ok(self.model.forward(&ids)?)
    }

    /// Tells of texts that the encoder does not read to their end.
    fn warn_of_long(&self, texts: &BTreeSet<String>, reporter: &dyn Reporter) -> Result<()> {
        let mut long = Vec::new();
        for text in texts {
            let encoded = self.tokenizer.encode(text)?;
            if encoded.n_tokens > encoded.ids.len() {
                long.push((text, encoded.n_tokens));
            }
        }
        if let Some((text, n)) = long.first() {
            reporter.emit(WorkerEvent::Alert {
                code: "caption.truncated".to_owned(),
                severity: Level::Warn,
                step: 0,
                detail: format!(
                    "{} texts are longer than the {} tokens that the text encoder reads, e.g. {text:?} ({n} tokens); the \
                     rest has no effect.",
                    long.len(),
                    self.tokenizer.max_length(),
                ),
            });
        }
        Ok(())
    }

    /// Embeds every text once, or finds it in the cache: the ids stand for text and tokenizer.
    fn embed(
        &self,
        texts: &BTreeSet<String>,
        cache: &mut TensorCache,
        reporter: &dyn Reporter,
    ) -> Result<BTreeMap<String, Tensor>> {
        let key = |ids: &[u32]| {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            self.key.clone().with(bytes)
        };
        let mut embeddings = BTreeMap::new();
        let mut missing: Vec<(&String, Vec<u32>)> = Vec::new();
        for text in texts {
            let ids = self.tokenizer.encode(text)?.ids;
            match cache.find(&key(&ids)).as_deref() {
                Some([embedding]) => {
                    embeddings.insert(text.clone(), embedding.clone());
                }
                _ => missing.push((text, ids)),
            }
        }
        for batch in missing.chunks(TEXT_BATCH) {
            reporter.check_stop()?;
            let ids: Vec<Vec<u32>> = batch.iter().map(|(_, ids)| ids.clone()).collect();
            let states = self.forward_ids(&ids)?.detach();
            for (i, (text, ids)) in batch.iter().enumerate() {
                // Not a view and not `copy`: both keep the whole batch.
                let embedding = states.get(i)?.force_contiguous()?;
                cache.store(&key(ids), std::slice::from_ref(&embedding));
                embeddings.insert((*text).clone(), embedding);
            }
        }
        Ok(embeddings)
    }
}
