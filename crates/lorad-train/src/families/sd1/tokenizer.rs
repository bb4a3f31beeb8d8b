//! CLIP's byte-pair tokenizer, from `tokenizer/tokenizer.json` or from `vocab.json` + `merges.txt`.

use std::path::Path;

use lorad_proto::problem::Problem;
use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

/// A caption as the text encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, padded or truncated to `model_max_length`, begin and end tokens included.
    pub ids: Vec<u32>,
    /// Tokens before truncation and padding, begin and end tokens included.
    pub n_tokens: usize,
}

/// CLIP's tokenizer with the padding that Stable Diffusion pipelines use.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    max_length: usize,
    end_id: u32,
    pad_id: u32,
}

impl ClipTokenizer {
    /// Reads a `tokenizer/` folder. `max_positions` is the text encoder's `max_position_embeddings`, which bounds the
    /// folder's `model_max_length`.
    ///
    /// # Errors
    /// `base_model.bad_tokenizer`, naming the file.
    ///
    /// # Source
    /// transformers v5.24 `models/clip/tokenization_clip.py` for the normalizer, the split pattern and the special tokens.
    pub fn from_dir(dir: &Path, max_positions: usize) -> Result<Self, Problem> {
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let token = |name: &str, default: &str| {
            token_text(&config[name])
                .or_else(|| token_text(&special[name]))
                .unwrap_or(default)
                .to_owned()
        };
        let begin = token("bos_token", "<|startoftext|>");
        let end = token("eos_token", "<|endoftext|>");
        let pad = token("pad_token", &end);
        let whole = dir.join("tokenizer.json");
        let mut tokenizer = if whole.exists() {
            Tokenizer::from_file(&whole).map_err(|e| bad(&whole, &e.to_string()))?
        } else {
            from_vocabulary(dir, &begin, &end)?
        };
        // Padding and truncation of the file are the pipeline's business, and it does them here, in `encode`.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| bad(dir, &e.to_string()))?;
        let unknown = token("unk_token", &end);
        // transformers finds special tokens in the text before it splits it; with SD 2.x's pad token "!", every "!".
        let special: Vec<AddedToken> = [&begin, &end, &pad, &unknown]
            .into_iter()
            .filter(|text| tokenizer.token_to_id(text).is_some())
            .map(|text| AddedToken::from(text.as_str(), true))
            .collect();
        tokenizer
            .add_special_tokens(special)
            .map_err(|e| bad(dir, &e.to_string()))?;
        let id = |text: &str| {
            tokenizer
                .token_to_id(text)
                .ok_or_else(|| bad(dir, &format!("the vocabulary has no token {text:?}")))
        };
        let (end_id, pad_id) = (id(&end)?, id(&pad)?);
        // Some configs hold 1e30 for "no limit".
        let limit = config["model_max_length"]
            .as_f64()
            .filter(|l| *l >= 3.0)
            .map_or(max_positions, |l| l as usize);
        Ok(Self {
            tokenizer,
            max_length: limit.min(max_positions),
            end_id,
            pad_id,
        })
    }

    /// Number of ids that [`Self::encode`] returns.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Number of tokens known.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Encodes a caption.
    ///
    /// # Errors
    /// If the tokenizer fails on the text.
    pub fn encode(&self, text: &str) -> Result<Encoded, Problem> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| {
            Problem::new(
                "caption.not_tokenizable",
                "A caption cannot be tokenized",
                format!("{text:?}: {e}"),
            )
        })?;
        let mut ids = encoding.get_ids().to_vec();
        let n_tokens = ids.len();
        if n_tokens > self.max_length {
            ids.truncate(self.max_length);
            ids[self.max_length - 1] = self.end_id;
        }
        ids.resize(self.max_length, self.pad_id);
        Ok(Encoded { ids, n_tokens })
    }
}

fn bad(path: &Path, detail: &str) -> Problem {
    Problem::new(
        "base_model.bad_tokenizer",
        "The tokenizer cannot be used",
        format!("{}: {detail}", path.display()),
    )
    .with_hint("Take the tokenizer/ folder from the original model.")
}

/// `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, Problem> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| bad(path, &e.to_string())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(bad(path, &e.to_string())),
    }
}

/// A special token is a string or an object with its text in `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Builds what `tokenizer.json` would hold from the two older files.
fn from_vocabulary(dir: &Path, begin: &str, end: &str) -> Result<Tokenizer, Problem> {
    let vocab_path = dir.join("vocab.json");
    let vocab = read_json(&vocab_path)?.ok_or_else(|| bad(&vocab_path, "no such file, and no tokenizer.json"))?;
    let merges_path = dir.join("merges.txt");
    let merges = std::fs::read_to_string(&merges_path).map_err(|e| bad(&merges_path, &e.to_string()))?;
    let merges: Vec<&str> = merges
        .lines()
        .filter(|l| !l.starts_with("#version") && !l.trim().is_empty())
        .collect();
    let id = |token: &str| {
        vocab[token]
            .as_u64()
            .ok_or_else(|| bad(&vocab_path, &format!("the vocabulary has no token {token:?}")))
    };
    let (begin_id, end_id) = (id(begin)?, id(end)?);
    let added = |id: u64, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let specials = format!("{}|{}", regex::escape(begin), regex::escape(end));
    let whole = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(begin_id, begin), added(end_id, end)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Removed", "invert": true, "pattern": {"Regex":
                format!(r"{specials}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+")}},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "RobertaProcessing", "sep": [end, end_id], "cls": [begin, begin_id],
                           "trim_offsets": false, "add_prefix_space": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": end, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    });
    let bytes = serde_json::to_vec(&whole).map_err(|e| bad(dir, &e.to_string()))?;
    Tokenizer::from_bytes(bytes).map_err(|e| bad(dir, &e.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn assets() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons/tokenizer")
    }

    /// A folder with the older files only.
    fn without_tokenizer_json() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
            "special_tokens_map.json",
        ] {
            std::fs::copy(assets().join(name), dir.path().join(name)).unwrap();
        }
        dir
    }

    /// Ids printed by transformers v5.24 `CLIPTokenizer` for this text.
    #[test]
    fn ids_equal_transformers_from_either_form_of_the_folder() {
        let expected = [
            0, 164, 290, 108, 393, 8, 98, 96, 355, 2059, 117, 118, 130, 1, 1, 1, 1, 1, 69, 132, 8, 97, 1,
        ];
        let older = without_tokenizer_json();
        for dir in [assets().as_path(), older.path()] {
            let tokenizer = ClipTokenizer::from_dir(dir, 32).unwrap();
            let encoding = tokenizer.encode("Hello it's a  CAT, 123 é ☃ don't").unwrap();
            assert_eq!(encoding.ids[..expected.len()], expected);
            assert!(encoding.ids[expected.len()..].iter().all(|&id| id == 1));
            assert_eq!((encoding.ids.len(), encoding.n_tokens), (32, expected.len()));
        }
    }

    #[test]
    fn a_long_caption_is_cut_before_its_end_token_and_says_how_long_it_was() {
        let tokenizer = ClipTokenizer::from_dir(&assets(), 32).unwrap();
        let encoding = tokenizer.encode(&"cat ".repeat(50)).unwrap();
        assert_eq!(
            (encoding.ids.len(), encoding.ids[0], encoding.ids[31], encoding.n_tokens),
            (32, 0, 1, 52)
        );
        assert_eq!(
            ClipTokenizer::from_dir(&assets(), 8)
                .unwrap()
                .encode("cat")
                .unwrap()
                .ids
                .len(),
            8
        );
    }

    #[test]
    fn a_folder_without_vocabulary_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            ClipTokenizer::from_dir(dir.path(), 77)
                .unwrap_err()
                .detail
                .contains("vocab.json")
        );
    }
}
