//! What a kohya file's header says about how it was made. Other tools filter and sort by it. All values are strings.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{BaseTraits, adapter::HostAdapter};
use crate::task::ExportContext;

/// Header of the kohya file; [`with_hashes`] adds what depends on the tensors.
///
/// # Source
/// kohya-ss/sd-scripts `train_network.py` (`metadata`), `library/sai_model_spec.py` (`build_metadata`).
pub(super) fn kohya(adapter: &HostAdapter, base: &BaseTraits, context: &ExportContext<'_>) -> BTreeMap<String, String> {
    let spec = context.spec;
    let mut m = BTreeMap::new();
    let mut set = |key: &str, value: String| {
        m.insert(key.to_owned(), value);
    };
    set("ss_network_module", "networks.lora".to_owned());
    set("ss_network_dim", adapter.rank.to_string());
    set("ss_network_alpha", adapter.alpha.to_string());
    set("ss_network_args", network_args(&spec.hyperparameters));
    set("ss_v2", if base.is_v2 { "True" } else { "False" }.to_owned());
    set("ss_base_model_version", base.kohya_version());
    set("ss_output_name", lorad_proto::spec::file_stem(&spec.job_name));
    set("ss_sd_model_name", spec.base_model.id.clone());
    set("ss_steps", context.steps.to_string());
    set("ss_epoch", (context.epoch.floor() as u64).to_string());
    set("ss_num_train_images", base.n_items.to_string());
    set("ss_resolution", format!("({0}, {0})", base.resolution));
    set(
        "ss_training_started_at",
        format!("{:.3}", context.started_at_ms as f64 / 1000.0),
    );
    for (key, name) in [
        ("ss_learning_rate", "learning_rate"),
        ("ss_unet_lr", "learning_rate"),
        ("ss_max_train_steps", "max_train_steps"),
        ("ss_num_epochs", "num_epochs"),
        ("ss_lr_scheduler", "lr_scheduler"),
        ("ss_lr_warmup_steps", "lr_warmup_steps"),
        ("ss_total_batch_size", "batch_size"),
        ("ss_gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("ss_max_grad_norm", "max_grad_norm"),
        ("ss_min_snr_gamma", "snr_gamma"),
        ("ss_noise_offset", "noise_offset"),
        ("ss_seed", "seed"),
    ] {
        match spec.hyperparameters.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(s)) => set(key, s.clone()),
            Some(other) => set(key, other.to_string()),
        }
    }
    let optimizer = spec.hyperparameters.get("optimizer").and_then(Value::as_str);
    set("ss_optimizer", format!("lorad.optim.{}", optimizer.unwrap_or("adamw")));
    set("ss_mixed_precision", "no".to_owned());
    let text_encoder_lr = spec.hyperparameters.get("text_encoder_lr").and_then(Value::as_f64);
    set(
        "ss_text_encoder_lr",
        text_encoder_lr.map_or_else(|| "None".to_owned(), |lr| lr.to_string()),
    );
    set("modelspec.sai_model_spec", "1.0.1".to_owned());
    set("modelspec.architecture", base.modelspec_architecture());
    set("modelspec.implementation", "diffusers".to_owned());
    set("modelspec.title", spec.job_name.clone());
    set("modelspec.resolution", format!("{0}x{0}", base.resolution));
    set(
        "modelspec.prediction_type",
        if base.v_prediction { "v" } else { "epsilon" }.to_owned(),
    );
    set("modelspec.date", iso_date(context.started_at_ms));
    m
}

/// What kohya's command line would have been given besides rank and alpha; values are strings there.
fn network_args(hyperparameters: &Map<String, Value>) -> String {
    let mut args = Map::new();
    if let Some(rank) = hyperparameters.get("conv_rank").filter(|rank| **rank != 0) {
        args.insert("conv_dim".to_owned(), rank.to_string().into());
        if let Some(alpha) = hyperparameters.get("conv_alpha") {
            args.insert("conv_alpha".to_owned(), alpha.to_string().into());
        }
    }
    Value::Object(args).to_string()
}

/// Adds the hashes of the data section, by which tools recognise a renamed or re-tagged file.
///
/// # Source
/// kohya-ss/sd-scripts `library/train_util.py` (`addnet_hash_safetensors`); ModelSpec 1.0.1 (`hash_sha256`).
pub(super) fn with_hashes(metadata: &mut BTreeMap<String, String>, data: &[u8]) {
    let digest = hex::encode(Sha256::digest(data));
    metadata.insert("modelspec.hash_sha256".to_owned(), format!("0x{digest}"));
    metadata.insert("sshs_model_hash".to_owned(), digest);
}

/// `2026-11-24T15:07:30`, UTC.
fn iso_date(ms: i64) -> String {
    let seconds = SystemTime::checked_add(&UNIX_EPOCH, Duration::from_millis(ms.max(0) as u64))
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to date: Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days, for days >= 0.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::iso_date;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(iso_date(0), "1970-01-01T00:00:00");
        assert_eq!(iso_date(951_782_400_000), "2000-02-29T00:00:00");
        assert_eq!(iso_date(1_709_251_199_000), "2024-02-29T23:59:59");
        assert_eq!(iso_date(1_709_251_200_000), "2024-03-01T00:00:00");
        assert_eq!(iso_date(1_795_532_850_123), "2026-11-24T15:07:30");
    }
}
