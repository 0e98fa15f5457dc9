//! Licences of everything that is compiled in, read from `cargo metadata`.

use anyhow::{Result, bail};

use crate::metadata::{self, Package};

const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "MPL-2.0+",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks every package of the product and of the guest image.
pub(crate) fn check() -> Result<()> {
    let mut packages = metadata::packages("Cargo.toml")?;
    packages.extend(metadata::packages("firmware/Cargo.toml")?);
    let wrong: Vec<String> = packages.iter().filter_map(complaint).collect();
    if !wrong.is_empty() {
        bail!("licences:\n  {}", wrong.join("\n  "));
    }
    println!("licences: {} packages, all allowed", packages.len());
    Ok(())
}

fn complaint(package: &Package) -> Option<String> {
    let Package { name, version, licence, .. } = package;
    match licence {
        None => Some(format!("{name} {version} names no licence")),
        Some(expression) if allowed(expression) => None,
        Some(expression) => {
            Some(format!("{name} {version} is under {expression:?} ({})", package.id))
        }
    }
}

/// Whether an SPDX expression can be satisfied. `AND` binds tighter than `OR`.
fn allowed(expression: &str) -> bool {
    let plain = expression.replace('/', " OR ");
    if let Some(inner) = outer_parentheses(plain.trim()) {
        return allowed(inner);
    }
    split(&plain, " OR ")
        .iter()
        .any(|choice| split(choice, " AND ").iter().all(|term| allowed_term(term)))
}

fn allowed_term(term: &str) -> bool {
    let term = term.trim();
    outer_parentheses(term).map_or_else(|| ALLOWED.contains(&term), allowed)
}

/// The inside of an expression that is one pair of parentheses.
fn outer_parentheses(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('(')?.strip_suffix(')')?;
    let mut depth = 0i32;
    for character in inner.chars() {
        depth += i32::from(character == '(') - i32::from(character == ')');
        if depth < 0 {
            return None;
        }
    }
    Some(inner)
}

/// Splits at an operator outside parentheses.
fn split<'a>(text: &'a str, operator: &str) -> Vec<&'a str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0i32, 0);
    for (at, character) in text.char_indices() {
        depth += i32::from(character == '(') - i32::from(character == ')');
        if depth == 0 && at >= start && text[at..].starts_with(operator) {
            parts.push(&text[start..at]);
            start = at + operator.len();
        }
    }
    parts.push(&text[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::allowed;

    #[test]
    fn reads_spdx_expressions() {
        for fine in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(allowed(fine), "{fine}");
        }
        for refused in ["GPL-3.0", "MIT AND GPL-2.0", "(MIT OR ISC) AND OpenSSL", ""] {
            assert!(!allowed(refused), "{refused}");
        }
    }
}
