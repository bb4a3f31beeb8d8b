//! One declaration of a hyperparameter, from which JSON Schema, validation, defaults, forms and documents are made.
//! Knows no family: a family holds a list of [`Field`]s.

use lorad_proto::problem::FieldError;
use serde_json::{Map, Value, json};

/// A hyperparameter.
#[derive(Debug)]
pub struct Field {
    /// Name in the job's `hyperparameters`.
    pub name: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// JSON text of the default; `null` where it is worked out from other things (the effect says from what).
    pub default: &'static str,
    /// Unit, may be empty.
    pub unit: &'static str,
    /// Where a form shows it.
    pub group: Group,
    /// One sentence: what it does.
    pub effect: &'static str,
}

/// A field, for tables.
pub const fn field(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    unit: &'static str,
    group: Group,
    effect: &'static str,
) -> Field {
    Field {
        name,
        kind,
        default,
        unit,
        group,
        effect,
    }
}

/// A number above 0.
pub const fn positive(max: f64) -> Kind {
    Kind::Number {
        min: 0.0,
        max,
        above_min: true,
    }
}

/// A number of at least 0.
pub const fn not_negative(max: f64) -> Kind {
    Kind::Number {
        min: 0.0,
        max,
        above_min: false,
    }
}

/// Type and range.
#[derive(Debug)]
pub enum Kind {
    /// A whole number, both ends included.
    Integer {
        /// Least.
        min: u64,
        /// Greatest.
        max: u64,
    },
    /// A number.
    Number {
        /// Least.
        min: f64,
        /// Greatest.
        max: f64,
        /// Whether `min` itself is excluded.
        above_min: bool,
    },
    /// Yes or no.
    Boolean,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Text of at most so many characters.
    Text {
        /// Most characters.
        max_chars: usize,
    },
    /// A preset's name, a pattern, or a list of names (`target_modules`).
    Targets,
    /// Values by pattern of module paths.
    Patterns {
        /// Least.
        min: f64,
        /// Greatest.
        max: f64,
        /// Whether values are whole numbers.
        whole: bool,
    },
}

/// Where a form shows a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Always.
    Basic,
    /// On request.
    Advanced,
}

/// JSON Schema 2020-12 of the fields.
pub fn json_schema(title: &str, fields: &[&Field]) -> Value {
    let mut properties = Map::new();
    for (order, field) in fields.iter().enumerate() {
        let mut property = match &field.kind {
            Kind::Integer { min, max } => json!({"type": "integer", "minimum": min, "maximum": max}),
            Kind::Number {
                min,
                max,
                above_min: true,
            } => {
                json!({"type": "number", "exclusiveMinimum": min, "maximum": max})
            }
            Kind::Number {
                min,
                max,
                above_min: false,
            } => json!({"type": "number", "minimum": min, "maximum": max}),
            Kind::Boolean => json!({"type": "boolean"}),
            Kind::Choice(words) => json!({"type": "string", "enum": words}),
            Kind::Text { max_chars } => json!({"type": "string", "minLength": 1, "maxLength": max_chars}),
            Kind::Patterns { min, max, whole } => {
                let value = if *whole {
                    json!({"type": "integer", "minimum": *min as u64, "maximum": *max as u64})
                } else {
                    json!({"type": "number", "minimum": min, "maximum": max})
                };
                json!({"type": "object", "additionalProperties": value})
            }
            Kind::Targets => json!({"oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ], "examples": ["attention", "transformer", ["to_q", "to_v"]]}),
        };
        property["description"] = json!(field.effect);
        let default = default_of(field);
        if !default.is_null() {
            property["default"] = default;
        }
        if !field.unit.is_empty() {
            property["x-unit"] = json!(field.unit);
        }
        property["x-group"] = json!(if field.group == Group::Basic {
            "basic"
        } else {
            "advanced"
        });
        property["x-order"] = json!(order);
        properties.insert(field.name.to_owned(), property);
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    })
}

/// The default as a value; `null` when there is none or the text is no JSON (a registry test forbids that).
pub fn default_of(field: &Field) -> Value {
    serde_json::from_str(field.default).unwrap_or(Value::Null)
}

/// Checks what was given and fills in the static defaults; fields whose default is worked out come back as `null`.
///
/// # Errors
/// Every field at fault; pointers like `/lora_rank`.
pub fn resolve(fields: &[&Field], given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>> {
    let mut errors = Vec::new();
    for name in given.keys().filter(|name| !fields.iter().any(|f| f.name == *name)) {
        errors.push(FieldError::new(pointer(name), "unknown_field", unknown(fields, name)));
    }
    let mut resolved = Map::new();
    for field in fields {
        let value = match given.get(field.name) {
            None | Some(Value::Null) => default_of(field),
            Some(value) => match check(field, value) {
                Ok(value) => value,
                Err((code, detail)) => {
                    errors.push(FieldError::new(pointer(field.name), code, detail));
                    continue;
                }
            },
        };
        resolved.insert(field.name.to_owned(), value);
    }
    if errors.is_empty() { Ok(resolved) } else { Err(errors) }
}

/// JSON pointer to a member, with the two escapes of RFC 6901.
fn pointer(name: &str) -> String {
    format!("/{}", name.replace('~', "~0").replace('/', "~1"))
}

fn unknown(fields: &[&Field], name: &str) -> String {
    let nearest = fields.iter().map(|f| (distance(f.name, name), f.name)).min();
    match nearest {
        Some((d, near)) if d <= 2.max(name.len() / 4) => {
            format!("there is no hyperparameter {name:?}; did you mean {near:?}?")
        }
        _ => {
            let known: Vec<&str> = fields.iter().map(|f| f.name).collect();
            format!("there is no hyperparameter {name:?}; known are {}", known.join(", "))
        }
    }
}

/// One value against its field; whole floats pass for integers (`8.0`).
fn check(field: &Field, value: &Value) -> Result<Value, (&'static str, String)> {
    let wrong_type = |expected: &str| ("wrong_type", format!("{value} is not {expected}"));
    match &field.kind {
        Kind::Integer { min, max } => {
            let whole = value.as_f64().filter(|v| v.fract() == 0.0);
            let Some(v) = value.as_u64().or_else(|| whole.filter(|v| *v >= 0.0).map(|v| v as u64)) else {
                return Err(match whole {
                    Some(_) => (
                        "out_of_range",
                        format!("{value} is out of range; allowed: {min} to {max}"),
                    ),
                    None => wrong_type("a whole number"),
                });
            };
            if v < *min || v > *max {
                return Err((
                    "out_of_range",
                    format!("{value} is out of range; allowed: {min} to {max}"),
                ));
            }
            Ok(json!(v))
        }
        Kind::Number { min, max, above_min } => {
            let v = value.as_f64().ok_or_else(|| wrong_type("a number"))?;
            let low = if *above_min { v <= *min } else { v < *min };
            if !v.is_finite() || low || v > *max {
                let from = if *above_min { "above " } else { "" };
                return Err((
                    "out_of_range",
                    format!("{value} is out of range; allowed: {from}{min} to {max}"),
                ));
            }
            Ok(json!(v))
        }
        Kind::Boolean => value
            .as_bool()
            .map(Value::Bool)
            .ok_or_else(|| wrong_type("true or false")),
        Kind::Choice(words) => match value.as_str() {
            Some(word) if words.contains(&word) => Ok(value.clone()),
            Some(word) => Err(("not_allowed", format!("{word:?} is not one of {}", words.join(", ")))),
            None => Err(wrong_type(&format!("one of the words {}", words.join(", ")))),
        },
        Kind::Text { max_chars } => {
            let text = value.as_str().ok_or_else(|| wrong_type("a text"))?;
            let n = text.chars().count();
            if n == 0 || n > *max_chars {
                let detail = format!("{n} characters; allowed: 1 to {max_chars}");
                return Err(("out_of_range", detail));
            }
            Ok(value.clone())
        }
        Kind::Patterns { min, max, whole } => {
            let entries = value
                .as_object()
                .ok_or_else(|| wrong_type("an object of patterns and values"))?;
            for (pattern, value) in entries {
                crate::lora::target::pattern(pattern).map_err(|detail| ("not_allowed", detail))?;
                let v = value.as_f64().filter(|v| !whole || v.fract() == 0.0);
                if !v.is_some_and(|v| (*min..=*max).contains(&v)) {
                    let number = if *whole { "a whole number" } else { "a number" };
                    let detail = format!("{value} for {pattern:?} is not {number} from {min} to {max}");
                    return Err(("out_of_range", detail));
                }
            }
            Ok(value.clone())
        }
        Kind::Targets => crate::lora::target::TargetModules::parse(value)
            .map(|_| value.clone())
            .map_err(|detail| ("not_allowed", detail)),
    }
}

/// Edits between two names (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FIELDS: &[Field] = &[
        Field {
            name: "lora_rank",
            kind: Kind::Integer { min: 1, max: 256 },
            default: "8",
            unit: "",
            group: Group::Basic,
            effect: "Rank.",
        },
        Field {
            name: "learning_rate",
            kind: Kind::Number {
                min: 0.0,
                max: 1.0,
                above_min: true,
            },
            default: "1e-4",
            unit: "",
            group: Group::Basic,
            effect: "Step size.",
        },
        Field {
            name: "init",
            kind: Kind::Choice(&["a", "b"]),
            default: "null",
            unit: "",
            group: Group::Advanced,
            effect: "Start.",
        },
    ];

    fn fields() -> Vec<&'static Field> {
        FIELDS.iter().collect()
    }

    fn resolved(given: &Value) -> Result<Map<String, Value>, Vec<FieldError>> {
        resolve(&fields(), given.as_object().unwrap())
    }

    #[test]
    fn all_faults_are_told_at_once_with_their_place() {
        let errors = resolved(&json!({"lora_rank": 0, "learning_rate": "fast", "init": "c", "lorarank": 4, "a/b": 1}))
            .unwrap_err();
        let found: Vec<(&str, &str)> = errors.iter().map(|e| (e.pointer.as_str(), e.code.as_str())).collect();
        assert_eq!(
            found,
            [
                ("/lorarank", "unknown_field"),
                ("/a~1b", "unknown_field"),
                ("/lora_rank", "out_of_range"),
                ("/learning_rate", "wrong_type"),
                ("/init", "not_allowed"),
            ]
        );
        assert!(errors[0].detail.contains("did you mean \"lora_rank\""));
    }

    #[test]
    fn zero_negative_huge_and_fractional_numbers_are_refused_where_they_mean_nothing() {
        for (name, value) in [
            ("lora_rank", json!(-1)),
            ("lora_rank", json!(1.5)),
            ("lora_rank", json!(1e300)),
            ("learning_rate", json!(0)),
            ("learning_rate", json!(-1e-4)),
            ("learning_rate", json!(2)),
        ] {
            let errors = resolved(&json!({name: value})).unwrap_err();
            assert_eq!(errors.len(), 1, "{name} = {value}");
        }
    }

    #[test]
    fn patterns_carry_values_of_their_range_and_are_patterns() {
        let ranks = field(
            "ranks",
            Kind::Patterns {
                min: 1.0,
                max: 64.0,
                whole: true,
            },
            "{}",
            "",
            Group::Advanced,
            "Ranks.",
        );
        let code = |value: Value| check(&ranks, &value).map_err(|(code, _)| code);
        assert!(code(json!({"to_q": 4, r"mid_block\..*": 8})).is_ok());
        assert_eq!(code(json!({"to_q": 0})), Err("out_of_range"));
        assert_eq!(code(json!({"to_q": 1.5})), Err("out_of_range"));
        assert_eq!(code(json!({"(": 4})), Err("not_allowed"));
        assert_eq!(code(json!(4)), Err("wrong_type"));
    }

    #[test]
    fn defaults_are_filled_in_and_whole_floats_are_integers() {
        let map = resolved(&json!({"lora_rank": 4.0})).unwrap();
        assert_eq!(
            Value::Object(map),
            json!({"lora_rank": 4, "learning_rate": 1e-4, "init": null})
        );
    }

    #[test]
    fn the_schema_carries_range_default_unit_and_order() {
        let schema = json_schema("T", &fields());
        assert_eq!(schema["properties"]["lora_rank"]["maximum"], 256);
        assert_eq!(schema["properties"]["learning_rate"]["exclusiveMinimum"], 0.0);
        assert_eq!(schema["properties"]["init"]["x-order"], 2);
        assert!(schema["properties"]["init"].get("default").is_none());
    }
}
