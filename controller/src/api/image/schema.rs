//! `/v2/schemas/…`: what an image looks like, for clients that ask.

use serde_json::{Value, json};

use super::super::body::Json;
use super::super::context::Context;
use super::super::policy;
use super::super::routes::Routes;
use super::images::NAME_MAX;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX).get("/v2/schemas/image", policy::IMAGE_SCHEMA, image).get(
        "/v2/schemas/images",
        policy::IMAGE_SCHEMA,
        images,
    )
}

fn image_schema() -> Value {
    let text = json!({"type": ["null", "string"], "maxLength": NAME_MAX});
    let number = json!({"type": "integer", "minimum": 0});
    let fixed = json!({"type": ["null", "string"], "readOnly": true});
    let fixed_number = json!({"type": ["null", "integer"], "readOnly": true});
    json!({
        "name": "image",
        "additionalProperties": {"type": "string"},
        "links": [
            {"rel": "self", "href": "{self}"},
            {"rel": "enclosure", "href": "{file}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
        "properties": {
            "id": {"type": "string"}, "name": text, "owner": text,
            "status": fixed, "checksum": fixed, "os_hash_algo": fixed, "os_hash_value": fixed,
            "created_at": fixed, "updated_at": fixed, "self": fixed, "file": fixed,
            "schema": fixed, "size": fixed_number, "virtual_size": fixed_number,
            "visibility": {"type": "string", "enum": ["community", "public", "private", "shared"]},
            "protected": {"type": "boolean"}, "os_hidden": {"type": "boolean"},
            "min_disk": number, "min_ram": number, "disk_format": text, "container_format": text,
            "tags": {"type": "array", "items": {"type": "string", "maxLength": NAME_MAX}},
        },
    })
}

async fn image(_: Context) -> Json {
    Json::ok(image_schema())
}

async fn images(_: Context) -> Json {
    Json::ok(json!({
        "name": "images",
        "links": [{"rel": "first", "href": "{first}"}, {"rel": "next", "href": "{next}"}],
        "properties": {
            "first": {"type": "string"}, "next": {"type": "string"},
            "schema": {"type": "string"},
            "images": {"type": "array", "items": image_schema()},
        },
    }))
}
