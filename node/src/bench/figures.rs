use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// The result of any benchmark: one form for all of them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    /// Which benchmark.
    pub(crate) bench: String,
    /// What was measured, from where to where, and how.
    pub(crate) method: String,
    /// Its series.
    pub(crate) series: Vec<Series>,
    /// Measurements that failed; they are in no series.
    pub(crate) failures: usize,
}

/// One series of measurements, in `unit`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// Name, stable between releases.
    pub(crate) name: String,
    /// Unit of the figures.
    pub(crate) unit: &'static str,
    /// Number of measurements.
    pub(crate) n: usize,
    /// Smallest.
    pub(crate) min: f64,
    /// Median.
    pub(crate) p50: f64,
    /// 90th percentile.
    pub(crate) p90: f64,
    /// 99th percentile.
    pub(crate) p99: f64,
    /// Largest.
    pub(crate) max: f64,
    /// Median CPU time of one measurement, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_ms_p50: Option<f64>,
    /// Median as a multiple of the floor's median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_to_floor_p50: Option<f64>,
}

impl Series {
    /// The figures of `samples`; `None` where there are none.
    pub(crate) fn new(name: &str, unit: &'static str, samples: Vec<f64>) -> Option<Series> {
        let samples = sorted(samples);
        let (min, max) = (*samples.first()?, *samples.last()?);
        Some(Series {
            name: name.to_string(),
            unit,
            n: samples.len(),
            min,
            p50: percentile(&samples, 50),
            p90: percentile(&samples, 90),
            p99: percentile(&samples, 99),
            max,
            cpu_ms_p50: None,
            ratio_to_floor_p50: None,
        })
    }

    /// The same series with the CPU time of its measurements, milliseconds.
    pub(crate) fn with_cpu(self, samples: Vec<f64>) -> Series {
        let samples = sorted(samples);
        let p50 = (!samples.is_empty()).then(|| percentile(&samples, 50));
        Series { cpu_ms_p50: p50, ..self }
    }
}

fn sorted(mut samples: Vec<f64>) -> Vec<f64> {
    samples.sort_by(f64::total_cmp);
    samples
}

/// The nearest-rank percentile of sorted samples.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

impl Figures {
    /// Gives each series in the unit of the series `floor` its median as a multiple of that one's.
    pub(crate) fn relate_to(&mut self, floor: &str) {
        let Some((floor_p50, unit)) = self.find(floor).map(|series| (series.p50, series.unit))
        else {
            return;
        };
        for series in self.series.iter_mut().filter(|series| series.unit == unit) {
            series.ratio_to_floor_p50 = Some(series.p50 / floor_p50);
        }
    }

    /// Gives one series its median as a multiple of another's, where both are there.
    pub(crate) fn relate(&mut self, name: &str, to: &str) {
        let Some(base_p50) = self.find(to).map(|series| series.p50) else { return };
        if let Some(series) = self.series.iter_mut().find(|series| series.name == name) {
            series.ratio_to_floor_p50 = Some(series.p50 / base_p50);
        }
    }

    /// A series by name.
    pub(crate) fn find(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }

    /// The same for people.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "series", "unit", "n", "min", "p50", "p90", "p99", "max", "cpu ms", "× floor",
        ]);
        for series in &self.series {
            let figure = |value: f64| format!("{value:.3}");
            let optional = |value: Option<f64>| value.map_or("–".into(), |v| format!("{v:.2}"));
            table.add_row([
                series.name.clone(),
                series.unit.to_string(),
                series.n.to_string(),
                figure(series.min),
                figure(series.p50),
                figure(series.p90),
                figure(series.p99),
                figure(series.max),
                optional(series.cpu_ms_p50),
                optional(series.ratio_to_floor_p50),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let failures = match self.failures {
            0 => String::new(),
            count => format!("\n{count} measurements failed"),
        };
        format!("bench {}: {}\n{table}{failures}", self.bench, self.method)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let series = Series::new("s", "ms", (1..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!(
            (series.min, series.p50, series.p90, series.p99, series.max),
            (1., 50., 90., 99., 100.)
        );
        let single = Series::new("s", "ms", vec![7.0]).unwrap();
        assert_eq!((single.p50, single.p99), (7.0, 7.0));
        assert!(Series::new("s", "ms", vec![]).is_none());
    }

    #[test]
    fn fields_that_do_not_apply_are_left_out() {
        let series = Series::new("s", "ms", vec![2.0]).unwrap();
        let mut figures =
            Figures { bench: "b".into(), method: "m".into(), series: vec![series], failures: 0 };
        let json = serde_json::to_value(&figures).unwrap();
        assert!(json["series"][0].get("ratio_to_floor_p50").is_none());
        figures.relate_to("s");
        assert_eq!(figures.series[0].ratio_to_floor_p50, Some(1.0));
    }
}
