//! Changes of an image as JSON Patch operations (`add`, `replace`, `remove`).

use serde::Deserialize;
use serde_json::Value;

use super::super::context::Context;
use super::super::error::ApiError;
use super::images::{check_bounds, check_format, may_have, property, visibility};
use super::view::BASE_FIELDS;
use crate::state::image::{Image, ImageUpdate};

/// One operation.
#[derive(Deserialize)]
pub(super) struct Operation {
    op: String,
    path: String,
    value: Option<Value>,
}

/// What the operations make of the image.
pub(super) fn apply(
    ctx: &Context,
    image: &Image,
    operations: &[Operation],
) -> Result<ImageUpdate, ApiError> {
    let mut update = ImageUpdate::of(image.id.clone());
    let mut properties = image.properties.clone();
    for operation in operations {
        let name = operation.path.strip_prefix('/').unwrap_or(&operation.path);
        let name = name.replace("~1", "/").replace("~0", "~");
        match (operation.op.as_str(), BASE_FIELDS.contains(&name.as_str())) {
            ("add" | "replace", true) => set_base(ctx, &mut update, &name, operation)?,
            ("add" | "replace", false) => {
                let value = operation.value.as_ref().unwrap_or(&Value::Null);
                properties.insert(name.clone(), property(&name, value)?);
            }
            ("remove", false) => {
                properties.remove(&name).ok_or_else(|| {
                    ApiError::conflict(format!("Property {name} does not exist."))
                })?;
            }
            ("remove", true) => {
                return Err(ApiError::forbidden(format!("Property {name} may not be removed.")));
            }
            (other, _) => {
                return Err(ApiError::bad_request(format!("There is no operation {other:?}.")));
            }
        }
    }
    let tags = update.tags.as_ref().unwrap_or(&image.tags);
    check_bounds(update.name.as_ref().and_then(Option::as_deref), tags, &properties)?;
    if properties != image.properties {
        update.properties = Some(properties);
    }
    Ok(update)
}

fn take<T: serde::de::DeserializeOwned>(name: &str, operation: &Operation) -> Result<T, ApiError> {
    let value = operation.value.clone().unwrap_or(Value::Null);
    serde_json::from_value(value)
        .map_err(|error| ApiError::bad_request(format!("Invalid value for '{name}': {error}")))
}

fn set_base(
    ctx: &Context,
    update: &mut ImageUpdate,
    name: &str,
    operation: &Operation,
) -> Result<(), ApiError> {
    match name {
        "name" => update.name = Some(take(name, operation)?),
        "visibility" => {
            let wanted = visibility(&take::<String>(name, operation)?)?;
            may_have(ctx, wanted)?;
            update.visibility = Some(wanted);
        }
        "protected" => update.protected = Some(take(name, operation)?),
        "os_hidden" => update.hidden = Some(take(name, operation)?),
        "min_disk" => update.min_disk = Some(take(name, operation)?),
        "min_ram" => update.min_ram = Some(take(name, operation)?),
        "tags" => update.tags = Some(take(name, operation)?),
        "disk_format" => {
            update.disk_format = take(name, operation)?;
            check_format(name, update.disk_format.as_ref())?;
        }
        "container_format" => {
            update.container_format = take(name, operation)?;
            check_format(name, update.container_format.as_ref())?;
        }
        _ => return Err(ApiError::forbidden(format!("Attribute '{name}' is read-only."))),
    }
    Ok(())
}
