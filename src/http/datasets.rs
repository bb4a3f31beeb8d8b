//! Datasets: upload, read, delete.

use axum::{
    Extension, Json,
    body::Body,
    extract::{Multipart, Path, Query, State, multipart::MultipartRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use lorad_proto::dataset::{Item, Report};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    access::Caller,
    body::{self, Fields, Upload},
    dto::{List, dataset_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{app::App, domain::Dataset, ingest::library};

/// A dataset.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Dataset)]
pub(super) struct DatasetDto {
    /// `ds_…`
    pub id: String,
    /// For people.
    pub name: String,
    /// `image`
    pub modality: String,
    /// Pictures.
    pub n_items: u32,
    /// Size of all pictures.
    pub bytes: u64,
    /// SHA-256 of the upload, hex.
    pub sha256: String,
    /// Whether it comes with the server.
    pub builtin: bool,
    /// Jobs that use it; above 0 it cannot be deleted.
    pub n_jobs: u64,
    /// When it was uploaded.
    pub created_at: String,
    /// What was found in the upload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<ReportDto>,
    /// Address of its items.
    pub items_url: String,
}

/// What was found in an upload.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DatasetReport)]
pub(super) struct ReportDto {
    /// One per file, in order of name.
    pub files: Vec<FileVerdictDto>,
    /// Usable items.
    pub n_items: u32,
    /// Items whose bytes equal an earlier item's.
    pub n_duplicates: u32,
    /// Longest caption, characters.
    pub max_caption_chars: u32,
    /// Smallest side, pixels.
    pub min_side: u32,
    /// Largest side, pixels.
    pub max_side: u32,
    /// Pictures that one epoch shows: repeats counted, and as many regularisation images as others if there are any.
    pub n_samples: u32,
    /// Regularisation images among the items.
    pub n_reg: u32,
}

/// What was found about one file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileVerdict)]
pub(super) struct FileVerdictDto {
    /// Name in the upload.
    pub file: String,
    /// `ok`, `warning`, `ignored`, `refused`.
    #[schema(value_type = String)]
    pub verdict: lorad_proto::dataset::Verdict,
    /// Stable code when not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// One sentence when not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl From<&Report> for ReportDto {
    fn from(report: &Report) -> Self {
        let files = report.files.iter().map(|f| FileVerdictDto {
            file: f.file.clone(),
            verdict: f.verdict,
            code: f.code.clone(),
            detail: f.detail.clone(),
        });
        Self {
            files: files.collect(),
            n_items: report.n_items,
            n_duplicates: report.n_duplicates,
            max_caption_chars: report.max_caption_chars,
            min_side: report.min_side,
            max_side: report.max_side,
            n_samples: report.samples(),
            n_reg: report.n_reg,
        }
    }
}

fn describe(dataset: &Dataset, n_jobs: u64, with_report: bool) -> DatasetDto {
    DatasetDto {
        id: dataset.id.to_string(),
        name: dataset.name.clone(),
        modality: dataset.modality.clone(),
        n_items: dataset.n_items,
        bytes: dataset.bytes,
        sha256: dataset.sha256.clone(),
        builtin: dataset.builtin,
        n_jobs,
        created_at: rfc3339(dataset.created_at_ms),
        report: with_report.then(|| (&dataset.report).into()),
        items_url: format!("/datasets/{}/items", dataset.id),
    }
}

/// An upload.
#[derive(Debug, ToSchema)]
#[schema(as = DatasetForm)]
#[expect(dead_code, reason = "only documents the form")]
pub(super) struct DatasetFormDto {
    /// A zip, tar or tar.gz of PNG, JPEG or WebP pictures, each with a caption: `a.png` with `a.txt` (or `.caption`), or
    /// one `metadata.jsonl`/`metadata.csv` with `file_name` and `text` (and perhaps `repeats` and `is_reg`). As in kohya's
    /// folders, `10_red apple/` shows its pictures ten times an epoch, and pictures below `reg/` are regularisation
    /// images. `a.mask.png` or `masks/a.png` says where the loss of `a.png` counts (white) with `masked_loss`.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// 1 to 200 characters; by default the name of the file.
    name: Option<String>,
}

/// Uploads a dataset. It is checked at once; a bad archive is refused whole, with every entry at fault named.
#[utoipa::path(post, path = "/datasets", tag = "datasets", request_body(content = DatasetFormDto, content_type = "multipart/form-data"), responses(
    (status = 201, body = DatasetDto, headers(("Location" = String))), (status = 400, body = ProblemDto), (status = 413, body = ProblemDto),
    (status = 415, body = ProblemDto), (status = 422, body = ProblemDto, description = "`errors` names every file"), (status = 507, body = ProblemDto)))]
pub(super) async fn create_dataset(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    form: Result<Multipart, MultipartRejection>,
) -> ApiResult<Response> {
    body::require_space(&app, &headers)?;
    let mut form = form.map_err(|_| {
        ApiError::new(
            Code::NotJson,
            "A dataset is sent as form data: `curl -F file=@pictures.zip`.",
        )
    })?;
    let (mut upload, mut name) = (None, None);
    while let Some(field) = form.next_field().await.map_err(body::multipart_error)? {
        match field.name() {
            Some("file") if upload.is_none() => {
                upload = Some(body::upload(field, &app.data.tmp(), app.config.limits.upload_bytes).await?);
            }
            Some("name") if name.is_none() => name = Some(body::text_part(field, 4096).await?),
            other => {
                let shown: String = other.unwrap_or("").chars().take(80).collect();
                let detail = format!("The part {shown:?} is not known or comes twice; known are file and name.");
                return Err(ApiError::new(Code::Multipart, detail));
            }
        }
    }
    let upload = upload.ok_or_else(|| ApiError::new(Code::Multipart, "The part `file` is missing."))?;
    let name = name.map(checked_name).transpose()?;
    // In a task of its own, so that a client that hangs up leaves no files without their row.
    let work = tokio::spawn(async move {
        let dataset = prepare(&app, &upload, name, "/file").await?;
        if let Err(error) = app.store.insert_dataset_of(&dataset, caller.owner()).await {
            library::discard(&dataset).await;
            return Err(error.into());
        }
        Ok::<_, ApiError>(dataset)
    });
    let dataset = work.await.map_err(ApiError::internal)??;
    let location = [(header::LOCATION, format!("/datasets/{}", dataset.id))];
    Ok((StatusCode::CREATED, location, Json(describe(&dataset, 0, true))).into_response())
}

fn checked_name(bytes: Vec<u8>) -> ApiResult<String> {
    let text = String::from_utf8(bytes)
        .map_err(|_| ApiError::new(Code::Multipart, "The part `name` is not UTF-8."))?
        .trim()
        .to_owned();
    let mut errors = Vec::new();
    let fits = Fields::of(serde_json::json!({}), "", &mut errors).check_label("name", &text, 200);
    if fits { Ok(text) } else { Err(ApiError::fields(errors)) }
}

/// Checks an upload and publishes its files; the store does not know the dataset yet. `prefix`: see
/// [`ApiError::ingest`].
pub(super) async fn prepare(app: &App, upload: &Upload, name: Option<String>, prefix: &str) -> ApiResult<Dataset> {
    let name = name.unwrap_or_else(|| name_from_file(upload.name.as_deref()));
    tracing::info!(
        bytes = upload.bytes,
        sha256 = upload.sha256,
        "checking an uploaded dataset"
    );
    library::prepare(app, upload.file.path(), &name, &upload.sha256)
        .await
        .map_err(|error| ApiError::ingest(error, prefix))
}

/// `my pictures.tar.gz` → `my pictures`.
fn name_from_file(file: Option<&str>) -> String {
    let base = file.unwrap_or("").rsplit(['/', '\\']).next().unwrap_or("");
    let stem = [".zip", ".tar.gz", ".tgz", ".tar"]
        .iter()
        .find_map(|ending| base.strip_suffix(ending))
        .unwrap_or(base);
    let name: String = stem.chars().filter(|c| !c.is_control()).take(200).collect();
    if name.trim().is_empty() {
        "dataset".to_owned()
    } else {
        name.trim().to_owned()
    }
}

/// Lists datasets, newest first.
#[utoipa::path(get, path = "/datasets", tag = "datasets", responses((status = 200, body = List<DatasetDto>)))]
pub(super) async fn list_datasets(State(app): State<App>) -> ApiResult<Json<List<DatasetDto>>> {
    let mut data = Vec::new();
    for dataset in app.store.datasets().await? {
        let n_jobs = app.store.dataset_uses(dataset.id).await?;
        data.push(describe(&dataset, n_jobs, false));
    }
    Ok(Json(List::complete(data)))
}

/// Reads a dataset, with the report on its files.
#[utoipa::path(get, path = "/datasets/{id}", tag = "datasets", params(("id" = String, Path, description = "`ds_…`")), responses(
    (status = 200, body = DatasetDto), (status = 404, body = ProblemDto)))]
pub(super) async fn get_dataset(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<DatasetDto>> {
    let dataset = app.store.dataset(dataset_id(&id)?).await?;
    let n_jobs = app.store.dataset_uses(dataset.id).await?;
    Ok(Json(describe(&dataset, n_jobs, true)))
}

/// Deletes a dataset that no job uses.
#[utoipa::path(delete, path = "/datasets/{id}", tag = "datasets", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto, description = "a job uses it, or it is built in")))]
pub(super) async fn delete_dataset(State(app): State<App>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let dataset = app.store.dataset(dataset_id(&id)?).await?;
    if dataset.builtin {
        return Err(ApiError::new(
            Code::Builtin,
            format!("The dataset {} comes with the server.", dataset.name),
        ));
    }
    app.store.delete_dataset(dataset.id).await?;
    library::discard(&dataset).await;
    Ok(StatusCode::NO_CONTENT)
}

/// One picture with its caption.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DatasetItem)]
pub(super) struct ItemDto {
    /// From 0.
    pub n: u32,
    /// Name in the upload.
    pub source: String,
    /// Caption.
    pub caption: String,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, hex.
    pub sha256: String,
    /// How often an epoch shows it.
    pub repeats: u32,
    /// Whether it is a regularisation image.
    pub is_reg: bool,
    /// Whether a mask says where its loss counts.
    pub has_mask: bool,
    /// A PNG of at most 256 px.
    pub thumb_url: String,
}

/// Which items.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ItemsQuery {
    /// Number of the last item of the page before.
    after: Option<u32>,
    /// 1 to 500, usually 100.
    limit: Option<u32>,
}

/// Lists a dataset's pictures with their captions.
#[utoipa::path(get, path = "/datasets/{id}/items", tag = "datasets", params(("id" = String, Path), ItemsQuery), responses(
    (status = 200, body = List<ItemDto>), (status = 404, body = ProblemDto)))]
pub(super) async fn dataset_items(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<ItemsQuery>,
) -> ApiResult<Json<List<ItemDto>>> {
    let limit = query.limit.unwrap_or(100);
    if !(1..=500).contains(&limit) {
        return Err(ApiError::new(Code::InvalidQuery, "`limit` must be 1 to 500."));
    }
    let dataset = app.store.dataset(dataset_id(&id)?).await?;
    let text = tokio::fs::read_to_string(dataset.path.join("items.jsonl"))
        .await
        .map_err(ApiError::internal)?;
    let from = query.after.map_or(0, |after| after as usize + 1);
    let mut data = Vec::new();
    for line in text.lines().skip(from).take(limit as usize) {
        let item: Item = serde_json::from_str(line).map_err(ApiError::internal)?;
        data.push(ItemDto {
            thumb_url: format!("/datasets/{}/items/{}/thumbnail", dataset.id, item.n),
            n: item.n,
            source: item.source,
            caption: item.caption,
            width: item.width,
            height: item.height,
            bytes: item.bytes,
            sha256: item.sha256,
            repeats: item.repeats,
            is_reg: item.is_reg,
            has_mask: item.mask.is_some(),
        });
    }
    Ok(Json(List {
        has_more: from + data.len() < dataset.n_items as usize,
        first_id: data.first().map(|item| item.n.to_string()),
        last_id: data.last().map(|item| item.n.to_string()),
        ..List::complete(data)
    }))
}

/// A picture's thumbnail, drawn anew by the server.
#[utoipa::path(get, path = "/datasets/{id}/items/{n}/thumbnail", tag = "datasets",
    params(("id" = String, Path), ("n" = u32, Path)), responses(
    (status = 200, content_type = "image/png", body = Vec<u8>), (status = 404, body = ProblemDto)))]
pub(super) async fn item_thumbnail(
    State(app): State<App>,
    Path((id, n)): Path<(String, String)>,
) -> ApiResult<Response> {
    let dataset = app.store.dataset(dataset_id(&id)?).await?;
    let missing = || ApiError::new(Code::FileNotFound, "There is no such picture.");
    let n: u32 = n.parse().map_err(|_| missing())?;
    let bytes = match tokio::fs::read(dataset.path.join(format!("thumbs/{n:05}.png"))).await {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
        Err(e) => return Err(ApiError::internal(e)),
    };
    let mut response = Body::from(bytes).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/png"));
    // A dataset never changes.
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("private, max-age=31536000, immutable"),
    );
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dataset_without_a_name_is_called_like_its_file() {
        assert_eq!(name_from_file(Some("my pictures.tar.gz")), "my pictures");
        assert_eq!(name_from_file(Some("C:\\x\\cats.zip")), "cats");
        assert_eq!(name_from_file(Some("\u{7}.zip")), "dataset");
        assert_eq!(name_from_file(None), "dataset");
    }
}
