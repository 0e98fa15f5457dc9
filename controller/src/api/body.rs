//! Request bodies: bounded, and with errors that name the field.

use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::{ApiError, ErrorKind};

/// The longest JSON body that is read. serde_json bounds the depth, at 128.
pub(crate) const JSON_BODY_BYTES_MAX: usize = 1024 * 1024;

/// A JSON body of the form `T`.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let bytes = read(request.into_body(), JSON_BODY_BYTES_MAX).await?;
        parse(&bytes).map(Self)
    }
}

async fn read(body: axum::body::Body, limit_bytes: usize) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, limit_bytes).await.map_err(|error| {
        let source = std::error::Error::source(&error);
        if source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>()) {
            ApiError::new(
                ErrorKind::TooLarge,
                format!("A request's body may have at most {limit_bytes} bytes."),
            )
        } else {
            ApiError::bad_request("The request's body ended early.")
        }
    })
}

/// `bytes` as JSON of the form `T`.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            ApiError::bad_request(format!("Invalid input for field/attribute {path}. {inner}"))
        } else {
            ApiError::bad_request(format!("The request's body is not JSON: {inner}"))
        }
    })?;
    json.end().map_err(|error| {
        ApiError::bad_request(format!("The request's body is not JSON: {error}"))
    })?;
    Ok(value)
}

/// A JSON answer.
pub(crate) struct Json(pub(crate) StatusCode, pub(crate) Value);

impl Json {
    pub(crate) fn ok(value: Value) -> Self {
        Self(StatusCode::OK, value)
    }

    pub(crate) fn created(value: Value) -> Self {
        Self(StatusCode::CREATED, value)
    }

    pub(crate) fn accepted(value: Value) -> Self {
        Self(StatusCode::ACCEPTED, value)
    }
}

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        let headers = [(http::header::CONTENT_TYPE, "application/json")];
        (self.0, headers, self.1.to_string()).into_response()
    }
}

/// Tells a field that is `null` from one that is absent: `Some(None)` and `None`.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de>,
{
    serde::Deserialize::deserialize(deserializer).map(Some)
}

/// A truth value, also as the texts that clients send in its place.
pub(crate) fn lenient_bool<'de, D>(deserializer: D) -> Result<Option<bool>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    use serde::de::{Deserialize, Error};
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::Bool(value) => Ok(Some(value)),
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "t" | "y" => Ok(Some(true)),
            "false" | "0" | "no" | "off" | "f" | "n" => Ok(Some(false)),
            "" => Ok(None),
            _ => Err(D::Error::custom(format!("{text:?} is not a boolean"))),
        },
        other => Err(D::Error::custom(format!("{other} is not a boolean"))),
    }
}

/// A number, also as text.
pub(crate) fn lenient_u64<'de, D>(deserializer: D) -> Result<Option<u64>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    use serde::de::{Deserialize, Error};
    let value = Value::deserialize(deserializer)?;
    let number = match &value {
        Value::Null => return Ok(None),
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .map(Some)
        .ok_or_else(|| D::Error::custom(format!("{value} is not a non-negative integer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[serde(default, deserialize_with = "nullable")]
        name: Option<Option<String>>,
        #[serde(default, deserialize_with = "lenient_u64")]
        size: Option<u64>,
    }

    #[test]
    fn tells_null_from_absent_and_names_the_field_in_error() {
        assert_eq!(parse::<Sample>(b"{}").unwrap().name, None);
        assert_eq!(parse::<Sample>(br#"{"name": null}"#).unwrap().name, Some(None));
        assert_eq!(parse::<Sample>(br#"{"size": "12"}"#).unwrap().size, Some(12));
        let error = parse::<Sample>(br#"{"size": -1}"#).unwrap_err();
        assert!(error.message.contains("size"), "{}", error.message);
        for bad in [b"{".as_slice(), b"", b"{} {}", &b"[".repeat(100_000)] {
            assert_eq!(parse::<Sample>(bad).unwrap_err().kind, ErrorKind::BadRequest);
        }
    }
}
