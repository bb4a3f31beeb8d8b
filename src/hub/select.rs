//! Which files of a repository a base model needs. Pure.

use lorad_proto::problem::Problem;

use super::{RemoteFile, Snapshot};

/// Parts with weights: folder, and the weight file's name without variant and extension.
const WEIGHTS: [(&str, &str); 3] = [
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
];
/// What must be there besides.
const CONFIGS: [&str; 2] = ["model_index.json", "scheduler/scheduler_config.json"];
/// Endings of formats that can run code.
const PICKLES: [&str; 5] = [".bin", ".ckpt", ".pt", ".pth", ".pkl"];

/// The files of the diffusers layout: configs, tokenizer, and of each part one set of safetensors, full precision first.
///
/// # Errors
/// `hub.not_diffusers`, `hub.pickle`, `hub.incomplete`, each naming what is there or missing.
pub fn choose(snapshot: &Snapshot) -> Result<Vec<RemoteFile>, Problem> {
    let find = |path: &str| snapshot.files.iter().find(|file| file.path == path);
    let repository = &snapshot.repository;
    if find("model_index.json").is_none() {
        let single: Vec<&str> = paths(snapshot)
            .filter(|p| p.ends_with(".safetensors"))
            .take(3)
            .collect();
        return Err(Problem::new(
            "hub.not_diffusers",
            "The repository is no model in the diffusers layout",
            format!("{repository} has no model_index.json."),
        )
        .with_hint(if single.is_empty() {
            "A repository with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/ is needed."
                .to_owned()
        } else {
            format!(
                "It holds {}: download that file and register it by its path, with tokenizer/ beside it.",
                single.join(", ")
            )
        }));
    }
    let mut chosen = Vec::new();
    for path in CONFIGS {
        chosen.push(find(path).ok_or_else(|| incomplete(repository, path))?.clone());
    }
    let tokenizer = |file: &&RemoteFile| {
        file.path
            .strip_prefix("tokenizer/")
            .is_some_and(|name| !name.contains('/') && (name.ends_with(".json") || name.ends_with(".txt")))
    };
    let before = chosen.len();
    chosen.extend(snapshot.files.iter().filter(tokenizer).cloned());
    if chosen.len() == before {
        return Err(incomplete(repository, "tokenizer/"));
    }
    for (folder, stem) in WEIGHTS {
        let config = format!("{folder}/config.json");
        chosen.push(find(&config).ok_or_else(|| incomplete(repository, &config))?.clone());
        chosen.extend(weights(snapshot, folder, stem)?);
    }
    Ok(chosen)
}

fn paths(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    snapshot.files.iter().map(|file| file.path.as_str())
}

/// In the order in which the trainer looks: fp32 before fp16, single before sharded.
fn weights(snapshot: &Snapshot, folder: &str, stem: &str) -> Result<Vec<RemoteFile>, Problem> {
    let find = |name: &str| {
        snapshot
            .files
            .iter()
            .find(|file| file.path == format!("{folder}/{name}"))
    };
    for variant in ["", ".fp16"] {
        if let Some(single) = find(&format!("{stem}{variant}.safetensors")) {
            return Ok(vec![single.clone()]);
        }
        for (index, shard) in [
            (
                format!("{stem}.safetensors.index{variant}.json"),
                format!("{folder}/{stem}{variant}-"),
            ),
            (
                format!("{stem}{variant}.safetensors.index.json"),
                format!("{folder}/{stem}{variant}-"),
            ),
        ] {
            if let Some(index) = find(&index) {
                let is_shard = |f: &&RemoteFile| f.path.starts_with(&shard) && f.path.ends_with(".safetensors");
                let shards = snapshot.files.iter().filter(is_shard);
                return Ok(std::iter::once(index).chain(shards).cloned().collect());
            }
        }
    }
    let beside: Vec<&str> = paths(snapshot)
        .filter(|path| path.starts_with(&format!("{folder}/")) && PICKLES.iter().any(|end| path.ends_with(end)))
        .collect();
    if beside.is_empty() {
        return Err(incomplete(
            &snapshot.repository,
            &format!("{folder}/{stem}.safetensors"),
        ));
    }
    Err(Problem::new(
        "hub.pickle",
        "The model has only Python pickles",
        format!(
            "{} has {} and no {folder}/{stem}.safetensors; pickles can run code and are never downloaded.",
            snapshot.repository,
            beside.join(", ")
        ),
    )
    .with_hint("Look for a revision or a copy with safetensors files."))
}

fn incomplete(repository: &str, path: &str) -> Problem {
    Problem::new(
        "hub.incomplete",
        "A file of the model is missing",
        format!("{repository} has no {path}."),
    )
    .with_hint("A model in the diffusers layout with safetensors weights is needed.")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::hub::Hash;

    fn snapshot(paths: &[&str]) -> Snapshot {
        let file = |path: &&str| RemoteFile {
            path: (*path).to_owned(),
            bytes: 1,
            hash: Hash::GitSha1(String::new()),
        };
        Snapshot {
            repository: "a/b".to_owned(),
            commit: "0".repeat(40),
            licence: String::new(),
            files: paths.iter().map(file).collect(),
        }
    }

    const REST: [&str; 8] = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    ];

    fn chosen(more: &[&str]) -> Result<Vec<String>, Problem> {
        choose(&snapshot(&[&REST[..], more].concat())).map(|files| files.into_iter().map(|f| f.path).collect())
    }

    #[test]
    fn only_what_is_needed_is_chosen_and_full_precision_first() {
        let more = [
            "README.md",
            "v1.ckpt",
            "safety_checker/model.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ];
        let mut found = chosen(&more).unwrap();
        found.sort();
        let mut expected: Vec<String> = REST.iter().map(|s| (*s).to_owned()).collect();
        expected.extend([more[5].to_owned(), more[6].to_owned()]);
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn shards_come_with_their_index() {
        let vae = "vae/diffusion_pytorch_model.safetensors";
        let unet = [
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        ];
        let found = chosen(&[&unet[..], &[vae]].concat()).unwrap();
        assert!(unet.iter().all(|path| found.iter().any(|f| f == path)), "{found:?}");
    }

    #[test]
    fn pickles_and_missing_parts_are_refused_by_name() {
        let vae = "vae/diffusion_pytorch_model.safetensors";
        let problem = chosen(&[vae, "unet/diffusion_pytorch_model.bin"]).unwrap_err();
        assert_eq!(problem.code, "hub.pickle");
        assert!(problem.detail.contains("unet/diffusion_pytorch_model.bin"));
        assert_eq!(chosen(&[vae]).unwrap_err().code, "hub.incomplete");
        let problem = choose(&snapshot(&["v1-5.safetensors"])).unwrap_err();
        assert_eq!(problem.code, "hub.not_diffusers");
        assert!(problem.hint.contains("v1-5.safetensors"), "{problem}");
    }
}
