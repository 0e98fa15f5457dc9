//! An image as Glance shows it.

use serde_json::{Map, Value, json};

use super::super::time;
use crate::state::image::Image;

/// What every image has; a free property can't have such a name.
pub(super) const BASE_FIELDS: &[&str] = &[
    "id",
    "name",
    "status",
    "visibility",
    "protected",
    "owner",
    "tags",
    "disk_format",
    "container_format",
    "min_disk",
    "min_ram",
    "size",
    "virtual_size",
    "checksum",
    "os_hash_algo",
    "os_hash_value",
    "os_hidden",
    "created_at",
    "updated_at",
    "self",
    "file",
    "schema",
    "locations",
    "direct_url",
    "stores",
];

pub(super) fn image_view(image: &Image) -> Value {
    let content = image.content.as_ref();
    let mut view = Map::new();
    for (name, value) in &image.properties {
        view.insert(name.clone(), json!(value));
    }
    let base = json!({
        "id": image.id,
        "name": image.name,
        "status": image.status.as_str(),
        "visibility": image.visibility.as_str(),
        "protected": image.protected,
        "owner": image.owner,
        "tags": image.tags,
        "disk_format": image.disk_format,
        "container_format": image.container_format,
        "min_disk": image.min_disk,
        "min_ram": image.min_ram,
        "size": content.map(|content| content.size_bytes),
        "virtual_size": content.map(|content| content.virtual_size_bytes),
        "checksum": content.map(|content| &content.md5),
        "os_hash_algo": content.map(|_| "sha512"),
        "os_hash_value": content.map(|content| &content.sha512),
        "os_hidden": image.hidden,
        "created_at": time::seconds(image.created_ms),
        "updated_at": time::seconds(image.updated_ms),
        "self": format!("/v2/images/{}", image.id),
        "file": format!("/v2/images/{}/file", image.id),
        "schema": "/v2/schemas/image",
    });
    if let Value::Object(base) = base {
        view.extend(base);
    }
    Value::Object(view)
}
