//! Lists as Neutron makes them: filtered by any attribute, sorted, cut into pages, reduced to
//! the fields that were asked for.

use std::cmp::Ordering;

use serde_json::{Map, Value, json};

use crate::api::body::Json;
use crate::api::context::Context;
use crate::api::error::ApiError;

const NOT_FILTERS: &[&str] =
    &["limit", "marker", "page_reverse", "sort_key", "sort_dir", "fields", "verbose"];

/// The answer to a list request: `{collection: […], collection_links: […]}`.
pub(super) fn list(ctx: &Context, collection: &str, items: Vec<Value>) -> Result<Json, ApiError> {
    let mut items: Vec<Value> = items.into_iter().filter(|item| admitted(ctx, item)).collect();
    sort(ctx, &mut items);
    let slice = ctx.query.page()?.cut(items, |item| item["id"].as_str().unwrap_or_default())?;
    let links = slice.links(&ctx.self_url(), &ctx.query);
    let items: Vec<Value> = slice.items.into_iter().map(|item| fields(ctx, item)).collect();
    let mut answer = json!({ collection: items });
    if let Some(links) = links {
        answer[format!("{collection}_links")] = links;
    }
    Ok(Json::ok(answer))
}

/// `{name: item}`, reduced to the fields that were asked for.
pub(super) fn show(ctx: &Context, name: &str, item: Value) -> Json {
    Json::ok(json!({ name: fields(ctx, item) }))
}

fn admitted(ctx: &Context, item: &Value) -> bool {
    let Some(object) = item.as_object() else { return true };
    ctx.query.names().filter(|name| !NOT_FILTERS.contains(name)).all(|name| {
        match object.get(name) {
            // What an object doesn't have can't keep it from the list.
            None => true,
            Some(value) => ctx.query.get_all(name).any(|wanted| matches(name, value, wanted)),
        }
    })
}

fn matches(name: &str, value: &Value, wanted: &str) -> bool {
    match value {
        Value::Null => wanted.is_empty() || wanted == "null",
        Value::Bool(value) => {
            wanted.eq_ignore_ascii_case(if *value { "true" } else { "false" })
                || (wanted == "1") == *value && matches!(wanted, "0" | "1")
        }
        Value::Number(number) => number.to_string() == wanted,
        Value::String(text) => text == wanted,
        // `fixed_ips=ip_address=10.0.0.5`, `fixed_ips=subnet_id=…`.
        Value::Array(entries) if name == "fixed_ips" => match wanted.split_once('=') {
            Some((key, wanted)) => entries.iter().any(|entry| entry[key] == wanted),
            None => entries.iter().any(|entry| entry["ip_address"] == wanted),
        },
        Value::Array(entries) => {
            wanted.split(',').all(|wanted| entries.iter().any(|entry| entry == wanted))
        }
        Value::Object(_) => false,
    }
}

fn sort(ctx: &Context, items: &mut [Value]) {
    let keys: Vec<&str> = ctx.query.get_all("sort_key").collect();
    let directions: Vec<&str> = ctx.query.get_all("sort_dir").collect();
    items.sort_by(|a, b| {
        let orders = keys.iter().enumerate().map(|(index, key)| {
            let order = compare(&a[*key], &b[*key]);
            let descending = directions.get(index).is_some_and(|direction| *direction == "desc");
            if descending { order.reverse() } else { order }
        });
        let order = orders.fold(Ordering::Equal, Ordering::then);
        order.then_with(|| compare(&a["id"], &b["id"]))
    });
}

fn compare(a: &Value, b: &Value) -> Ordering {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_u64().cmp(&b.as_u64()),
        (Value::String(a), Value::String(b)) => a.cmp(b),
        (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
        (a, b) => a.to_string().cmp(&b.to_string()),
    }
}

/// Clients also send all the names as the text of one Python list.
fn fields(ctx: &Context, item: Value) -> Value {
    if !ctx.query.has("fields") {
        return item;
    }
    let part_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let wanted: Vec<&str> = ctx
        .query
        .get_all("fields")
        .flat_map(|names| names.split(move |c| !part_of_name(c)))
        .filter(|name| !name.is_empty())
        .collect();
    match item {
        Value::Object(object) => {
            let kept = object.into_iter().filter(|(name, _)| wanted.contains(&name.as_str()));
            Value::Object(kept.collect::<Map<_, _>>())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compare_values_as_clients_write_them() {
        assert!(matches("shared", &json!(true), "True"));
        assert!(matches("shared", &json!(false), "0"));
        assert!(!matches("shared", &json!(true), "false"));
        assert!(matches("mtu", &json!(1450), "1450"));
        let fixed_ips = json!([{"ip_address": "10.0.0.5", "subnet_id": "s"}]);
        assert!(matches("fixed_ips", &fixed_ips, "ip_address=10.0.0.5"));
        assert!(!matches("fixed_ips", &fixed_ips, "subnet_id=t"));
        assert!(matches("tags", &json!(["a", "b"]), "b,a"));
        assert!(!matches("tags", &json!(["a"]), "a,b"));
    }
}
