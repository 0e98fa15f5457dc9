use serde_json::Value;

/// A refusal by one of the APIs.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {status} {message}")]
pub(crate) struct ApiError {
    /// Method and path.
    pub(crate) what: String,
    /// HTTP status.
    pub(crate) status: u16,
    /// The API's own words.
    pub(crate) message: String,
}

impl ApiError {
    /// Reads the message from whichever form the service uses.
    pub(super) fn new(what: String, status: u16, body: &str) -> ApiError {
        let parsed: Option<Value> = serde_json::from_str(body).ok();
        let message = parsed
            .as_ref()
            .and_then(Value::as_object)
            .and_then(|object| object.values().find_map(|inner| inner.get("message")))
            .and_then(Value::as_str)
            .unwrap_or(body.trim());
        ApiError { what, status, message: message.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::ApiError;

    #[test]
    fn finds_the_message_in_each_services_form() {
        for (body, message) in [
            (r#"{"itemNotFound": {"code": 404, "message": "no server"}}"#, "no server"),
            (r#"{"NeutronError": {"type": "X", "message": "no port", "detail": ""}}"#, "no port"),
            ("<html>", "<html>"),
        ] {
            assert_eq!(ApiError::new("GET /".into(), 404, body).message, message);
        }
    }
}
