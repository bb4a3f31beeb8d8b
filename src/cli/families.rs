//! `lorad families`: what can be trained, and every hyperparameter of it, from the family's own schema.

use anyhow::{Result, bail};
use lorad::trainer::TrainerCatalog;
use lorad_proto::catalog::{Catalog, FamilyInfo};
use serde_json::Value;

use super::{Exit, args::Families, tables::table};

/// Runs the command.
pub(crate) fn run(args: &Families) -> Result<Exit> {
    let families = TrainerCatalog.families();
    let Some(id) = &args.id else {
        if args.json {
            println!("{}", serde_json::to_string_pretty(&families)?);
        } else {
            let rows = families
                .iter()
                .map(|f| vec![f.id.clone(), f.name.clone(), f.summary.clone()]);
            println!("{}", table(&rows.collect::<Vec<_>>()));
        }
        return Ok(Exit::Ok);
    };
    let Some(family) = families.iter().find(|family| family.id == *id) else {
        let known: Vec<_> = families.iter().map(|family| family.id.as_str()).collect();
        bail!("no family `{id}`; there is: {}", known.join(", "));
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&family.schema)?);
    } else if args.markdown {
        print!("{}", page(family));
    } else {
        println!("{}\n", family.summary);
        let mut rows = vec![
            ["option", "default", "allowed", "what it does"]
                .map(str::to_owned)
                .to_vec(),
        ];
        rows.extend(
            options(family)
                .into_iter()
                .map(|o| vec![o.name, o.default, o.allowed, o.description]),
        );
        println!("{}", table(&rows));
    }
    Ok(Exit::Ok)
}

/// One hyperparameter, ready to print.
struct Knob {
    name: String,
    group: String,
    default: String,
    allowed: String,
    description: String,
}

/// The schema's properties in the order of its forms.
fn options(family: &FamilyInfo) -> Vec<Knob> {
    let mut properties: Vec<(&String, &Value)> =
        family.schema["properties"].as_object().into_iter().flatten().collect();
    properties.sort_by_key(|(_, schema)| schema["x-order"].as_i64().unwrap_or(i64::MAX));
    properties
        .into_iter()
        .map(|(name, schema)| Knob {
            name: name.clone(),
            group: text(&schema["x-group"]),
            default: default(schema),
            allowed: allowed(schema),
            description: text(&schema["description"]),
        })
        .collect()
}

fn default(schema: &Value) -> String {
    match schema.get("default") {
        None | Some(Value::Null) => "-".to_owned(),
        Some(value) => text(value),
    }
}

/// Range, choices or type, with the unit.
fn allowed(schema: &Value) -> String {
    let unit = schema["x-unit"]
        .as_str()
        .filter(|unit| !unit.is_empty())
        .map(|unit| format!(" {unit}"))
        .unwrap_or_default();
    if let Some(choices) = schema["enum"].as_array() {
        return choices.iter().map(text).collect::<Vec<_>>().join(" | ");
    }
    if let Some(variants) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        return variants
            .iter()
            .map(allowed)
            .filter(|v| !v.is_empty())
            .collect::<Vec<_>>()
            .join(" | ");
    }
    let range = match (&schema["minimum"], &schema["maximum"]) {
        (Value::Number(min), Value::Number(max)) => format!("{min} to {max}"),
        (min, max) => {
            let low = bound(min, "≥").or_else(|| bound(&schema["exclusiveMinimum"], ">"));
            let high = bound(max, "≤").or_else(|| bound(&schema["exclusiveMaximum"], "<"));
            [low, high].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
    };
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().map(text).collect::<Vec<_>>().join(" or "),
        Value::String(kind) if kind == "array" => "list".to_owned(),
        Value::String(kind) if kind == "object" => format!("map to {}", allowed(&schema["additionalProperties"])),
        kind => text(kind),
    };
    if range.is_empty() {
        format!("{kind}{unit}")
    } else {
        format!("{kind} {range}{unit}")
    }
}

fn bound(value: &Value, sign: &str) -> Option<String> {
    value.is_number().then(|| format!("{sign} {value}"))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// The page `docs/families/<id>.md`.
fn page(family: &FamilyInfo) -> String {
    let mut page = format!(
        "# {} (`{}`)\n\n<!-- Written by `cargo xtask docs` from the family's schema; edit that instead. -->\n\n{}\n\n\
         ## Hyperparameters\n\nThese are the names in a job's `hyperparameters` and in `lorad train --set`. Unknown names are \
         refused.\n",
        family.name, family.id, family.summary
    );
    for (group, title) in [("basic", "Basic"), ("advanced", "Advanced")] {
        let options = options(family);
        let mut options = options
            .iter()
            .filter(|o| o.group == group || (group == "advanced" && o.group != "basic"))
            .peekable();
        if options.peek().is_none() {
            continue;
        }
        page.push_str(&format!(
            "\n### {title}\n\n| option | default | allowed | what it does |\n|---|---|---|---|\n"
        ));
        for o in options {
            let cells = [
                format!("`{}`", o.name),
                o.default.clone(),
                o.allowed.clone(),
                o.description.clone(),
            ];
            page.push_str(&format!(
                "| {} |\n",
                cells
                    .map(|cell| cell.replace('|', "\\|").replace('\n', " "))
                    .join(" | ")
            ));
        }
    }
    page.push_str("\n## Figures of each step\n\n| name | title | unit | better |\n|---|---|---|---|\n");
    for metric in &family.metrics {
        let better = match metric.higher_is_better {
            Some(true) => "higher",
            Some(false) => "lower",
            None => "-",
        };
        page.push_str(&format!(
            "| `{}` | {} | {} | {better} |\n",
            metric.name, metric.title, metric.unit
        ));
    }
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn family() -> FamilyInfo {
        FamilyInfo {
            id: "toy".into(),
            name: "Toy".into(),
            summary: "A toy.".into(),
            modality: "image".into(),
            schema: json!({"properties": {
                "seed": {"type": "integer", "minimum": 0, "x-order": 2, "x-group": "advanced", "description": "Seed."},
                "lr_scheduler": {"enum": ["constant", "cosine"], "default": "constant", "x-order": 1, "x-group": "basic"},
            }}),
            metrics: Vec::new(),
        }
    }

    #[test]
    fn options_keep_the_order_of_the_form_and_say_what_is_allowed() {
        let options = options(&family());
        assert_eq!(options[0].name, "lr_scheduler");
        assert_eq!(options[0].allowed, "constant | cosine");
        assert_eq!(options[1].allowed, "integer ≥ 0");
        assert_eq!(options[1].default, "-");
    }

    #[test]
    fn a_choice_does_not_break_the_page_table() {
        assert!(page(&family()).contains(r"constant \| cosine"));
    }
}
