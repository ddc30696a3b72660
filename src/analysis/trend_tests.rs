//! Shapes of series without chance, and any series at all. How often chance misleads: tests/leaks_simulated.rs.

use super::*;
use proptest::prelude::*;

/// A series with a point a minute.
fn shape(live: impl Iterator<Item = f32>) -> Shape {
    let points: Vec<Point> = live.map(|live| Point { live, ..Point::default() }).collect();
    let times: Vec<f64> = (0..points.len()).map(|n| n as f64 * 60.0).collect();
    Trend::new(&times, &points, 0.0).shape()
}

const MB: f32 = 1e6;

#[test]
fn shapes_are_told_apart() {
    let minutes = || (0..61).map(|n| n as f32);
    assert_eq!(shape(minutes().map(|n| n * MB)), Shape::Grows);
    // With a large load at the start, and with noise upon it.
    assert_eq!(shape(minutes().map(|n| if n > 0.0 { 500.0 * MB + n * MB } else { 0.0 })), Shape::Grows);
    assert_eq!(shape(minutes().map(|n| n * MB + (n * 7.0 % 5.0) * 0.3 * MB)), Shape::Grows);
    assert_eq!(shape(minutes().map(|n| n.min(20.0) * MB)), Shape::Flattens);
    assert_eq!(shape(minutes().map(|n| (1.0 - (-n / 12.0).exp()) * MB)), Shape::Flattens);
    assert_eq!(shape(minutes().map(|n| n % 10.0 * MB)), Shape::Sawtooth);
    assert_eq!(shape(minutes().map(|n| if n > 0.0 { MB } else { 0.0 })), Shape::Stable);
    assert_eq!(shape(minutes().map(|n| if n > 3.0 { MB } else { n * 0.2 * MB })), Shape::Stable);
    assert_eq!(shape(minutes().take(8).map(|n| n * MB)), Shape::TooShort);
    // One jump, and one tooth, are no trend.
    assert_ne!(shape(minutes().map(|n| if n > 45.0 { MB } else { 0.0 })), Shape::Grows);
    assert_ne!(shape(minutes().map(|n| n % 40.0 * MB)), Shape::Grows);
}

#[test]
fn a_rate_is_that_of_the_line() {
    let times: Vec<f64> = (0..61).map(|n| f64::from(n) * 60.0).collect();
    let live = |n: usize| 3e6 + n as f32 * 60.0 * 1000.0 + (n * 37 % 11) as f32 * 5000.0;
    let points: Vec<Point> = (0..61).map(|n| Point { live: live(n), ..Point::default() }).collect();
    let rate = Trend::new(&times, &points, 0.0).rate();
    assert!((rate.value - 1000.0).abs() < 20.0 && rate.low < 1000.0 && rate.high > 1000.0, "{rate:?}");
}

#[test]
fn few_samples_are_no_proof() {
    // One sample of a small block at each of 6 moments stands for half a mebibyte each.
    let (times, one) = ((0..61).map(f64::from).collect::<Vec<_>>(), 512.0 * 1024.0_f32);
    let grown = |samples: usize| {
        let points: Vec<Point> = (0..61)
            .map(|n| {
                let (now, before) = (n * samples / 60, (n.max(1) - 1) * samples / 60);
                let variance = |samples: usize| samples as f32 * one * one;
                Point {
                    live: now as f32 * one,
                    stock_variance: variance(now),
                    flow_variance: variance(now - before),
                }
            })
            .collect();
        Trend::new(&times, &points, f64::from(one * one)).shape()
    };
    assert_eq!(grown(6), Shape::Unsure);
    assert_eq!(grown(40), Shape::Grows);
}

proptest! {
    #[test]
    fn any_series_has_a_shape_and_a_rate(
        live in prop::collection::vec(prop_oneof![Just(0.0f32), 0.0f32..1e18, any::<u32>().prop_map(|n| n as f32)], 1..40),
        steps in prop::collection::vec(0.0f64..1e5, 40),
        variance in 0.0f32..1e30,
    ) {
        let mut time = 0.0;
        let times: Vec<f64> = live.iter().zip(&steps).map(|(_, step)| { time += step; time }).collect();
        let points: Vec<Point> = live
            .iter()
            .map(|live| Point { live: *live, stock_variance: variance, flow_variance: variance })
            .collect();
        let trend = Trend::new(&times, &points, f64::from(variance));
        trend.shape();
        let (rate, mean) = (trend.rate(), trend.mean_rate());
        prop_assert!(!rate.value.is_nan() && !rate.low.is_nan() && !mean.high.is_nan());
        prop_assert!(rate.low <= rate.high && mean.low <= mean.high);
    }
}
