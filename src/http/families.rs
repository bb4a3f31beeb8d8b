//! Model families: what can be trained, and the schema of its hyperparameters.

use axum::{
    Json,
    extract::{Path, State},
    http::header,
    response::{IntoResponse as _, Response},
};
use lorad_proto::catalog::FamilyInfo;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    dto::List,
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::app::App;

/// A model family.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Family)]
pub(super) struct FamilyDto {
    /// Stable id, e.g. `sd1`.
    pub id: String,
    /// For people.
    pub name: String,
    /// One sentence.
    pub summary: String,
    /// `image`, `text`, `audio`, `video`.
    pub modality: String,
    /// The figures that its steps carry.
    pub metrics: Vec<MetricDto>,
    /// Address of its hyperparameters' JSON Schema.
    pub schema_url: String,
}

/// A figure that describes itself.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Metric)]
pub(super) struct MetricDto {
    /// Column name, e.g. `loss`.
    pub name: String,
    /// For people.
    pub title: String,
    /// Unit, may be empty.
    pub unit: String,
    /// Whether more is better; null: neither.
    pub higher_is_better: Option<bool>,
}

fn describe(family: FamilyInfo) -> FamilyDto {
    FamilyDto {
        schema_url: format!("/families/{}/schema", family.id),
        id: family.id,
        name: family.name,
        summary: family.summary,
        modality: family.modality,
        metrics: family
            .metrics
            .into_iter()
            .map(|m| MetricDto {
                name: m.name,
                title: m.title,
                unit: m.unit,
                higher_is_better: m.higher_is_better,
            })
            .collect(),
    }
}

/// Lists model families.
#[utoipa::path(get, path = "/families", tag = "models", responses((status = 200, body = List<FamilyDto>)))]
pub(super) async fn list_families(State(app): State<App>) -> Json<List<FamilyDto>> {
    Json(List::complete(
        app.catalog.families().into_iter().map(describe).collect(),
    ))
}

/// JSON Schema 2020-12 of a family's hyperparameters: type, range, default, description, and `x-unit`, `x-group`,
/// `x-order` for forms.
#[utoipa::path(get, path = "/families/{id}/schema", tag = "models", params(("id" = String, Path)), responses(
    (status = 200, body = Object, content_type = "application/schema+json"), (status = 404, body = ProblemDto)))]
pub(super) async fn family_schema(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Response> {
    let family = app.catalog.families().into_iter().find(|family| family.id == id);
    let schema: Value = family
        .map(|family| family.schema)
        .ok_or_else(|| ApiError::new(Code::FamilyNotFound, "There is no such family."))?;
    Ok(([(header::CONTENT_TYPE, "application/schema+json")], schema.to_string()).into_response())
}
